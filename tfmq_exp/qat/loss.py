"""The loss of diffusion training: the error of the predicted noise (DDPM, arXiv 2006.11239, eq. 14)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Norm = Literal["l1", "l2"]
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def noisy(
    clean: Float[Tensor, "batch *rest"],
    noise: Float[Tensor, "batch *rest"],
    t: Int[Tensor, "batch"],
    alphas_cumprod: Float[Tensor, "timesteps"],
) -> Float[Tensor, "batch *rest"]:
    """x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise, row by row (eq. 4).

    Args:
        clean: x_0, images or latents.
        noise: standard normal.
        t: timestep of each row, 0 to timesteps - 1.
        alphas_cumprod: alpha-bar of every timestep of the training.
    """
    alpha = alphas_cumprod[t].reshape(-1, *(1,) * (clean.dim() - 1))
    return (alpha.sqrt().to(clean.dtype) * clean).addcmul((1 - alpha).sqrt().to(clean.dtype), noise)


def loss(predicted: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], norm: Norm) -> Float[Tensor, ""]:
    """Mean squared (l2) or absolute (l1) difference, in float32 whatever the precision of the network."""
    return LOSSES[norm](predicted.float(), noise.float())
