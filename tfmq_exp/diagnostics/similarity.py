"""Similarity of two networks' features for the same examples: linear CKA and cosine, minibatch by minibatch."""

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_EXAMPLES = 4  # that the unbiased estimate is defined for
ROUNDING = 1e-6  # of the features' norm; what varies less is float32's rounding


def unbiased_hsic(
    k: Float[Tensor, "... examples examples"], m: Float[Tensor, "... examples examples"]
) -> Float[Tensor, "..."]:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion from two Gram matrices of at least four examples.

    That is HSIC_1 of Song et al. (JMLR 13, 2012), here as the scalar product of the U-centred matrices (Székely and Rizzo,
    arXiv 1310.2926), which needs no product of matrices.
    """
    n = k.shape[-1]
    return (_u_centred(k) * _u_centred(m)).sum((-2, -1)) / (n * (n - 3))


def _u_centred(k: Tensor) -> Tensor:
    n = k.shape[-1]
    off = k - torch.diag_embed(k.diagonal(dim1=-2, dim2=-1))
    rows = off.sum(-1, keepdim=True) / (n - 2)
    centred = off - rows - rows.transpose(-2, -1) + off.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))


def similarity_sums(x: Float[Tensor, "examples features"], y: Float[Tensor, "examples others"]) -> Float[Tensor, "6"]:
    """Sums of a minibatch, in double precision; those over all minibatches go to `similarities`.

    Args:
        x: features of one network, as many as of the other for the cosine.
        y: of the other, for the same examples.

    Returns:
        three unbiased HSICs of linear kernels, of x with y, x with x, y with y, each times the number of examples; and the
        scalar products of all features as one vector, in the same order. The HSICs of fewer than four examples are 0.
    """
    a, b = x.double(), y.double()
    products = torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
    if len(x) < LEAST_EXAMPLES:
        return torch.cat([torch.zeros_like(products), products]).cpu()
    a, b = _varying(a), _varying(b)
    k, m = a @ a.T, b @ b.T
    return torch.cat([len(x) * unbiased_hsic(torch.stack([k, k, m]), torch.stack([m, k, m])), products]).cpu()


def _varying(x: Tensor) -> Tensor:
    """Features less their means, which changes no estimate but keeps digits where means are large; 0 if that is rounding."""
    centred = x - x.mean(0)
    return centred * (centred.norm() > ROUNDING * x.norm())


def similarities(sums: Float[Tensor, "... 6"]) -> Float[Tensor, "... 2"]:
    """Linear CKA and cosine from sums over minibatches; NaN where the features of one network do not vary, or are 0.

    CKA (Kornblith et al., arXiv 1905.00414) in the minibatch form of Nguyen et al. (arXiv 2010.15327): means of
    unbiased HSICs are divided. It is 1 for features that are equal up to rotation and scale, and may exceed it by noise.
    """
    both, x, y = sums.unflatten(-1, (2, 3)).unbind(-1)
    return torch.where((x > 0) & (y > 0), both / (x.clamp(min=0) * y.clamp(min=0)).sqrt(), torch.nan)
