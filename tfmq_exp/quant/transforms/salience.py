"""Spearman's rho-guided salience calibration (SSC, PTQ4DiT, arXiv 2405.16005).

Rows of activations whose salient channels are not those of the weight weigh more when one balance has to serve all of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def ranks(x: Float[Tensor, "*rest values"]) -> Float[Tensor, "*rest values"]:
    """Ranks along the last axis, from 1, in double precision; equal values share the mean of theirs."""
    x = x.contiguous()
    ordered = x.sort(dim=-1).values
    below = torch.searchsorted(ordered, x)
    up_to = torch.searchsorted(ordered, x, right=True)
    return (below + up_to + 1).double() / 2


def spearman(x: Float[Tensor, "*rest values"], y: Float[Tensor, "*other values"]) -> Float[Tensor, "*rest"]:
    """Spearman's rank correlation along the last axis, in [-1, 1] and double precision; 0 where all values of one are equal.

    Other axes broadcast.
    """
    a, b = (each - each.mean(-1, keepdim=True) for each in (ranks(x), ranks(y)))
    sizes = a.square().sum(-1) * b.square().sum(-1)
    return torch.where(sizes > 0, (a * b).sum(-1) / sizes.clamp(min=1).sqrt(), 0.0)


def salience(
    activations: Float[Tensor, "rows channels"], weights: Float[Tensor, "channels"]
) -> Float[Tensor, "channels"]:
    """Salience of the channels over all rows: sum of eta_r s(X^r), eta = softmax(-rho), rho_r = spearman(s(X^r), s(W)).

    `activations` are the rows' largest magnitudes (`row_maxima`), `weights` the weight's (`channel_maxima`). Rows are timesteps
    in the paper, rows of the calibration batch in the released code (adreamwu/PTQ4DiT fc27e97).
    """
    rho = spearman(activations, weights)
    return (torch.softmax(-rho, dim=0).to(activations)[:, None] * activations).sum(0)
