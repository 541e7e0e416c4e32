"""Rectified flow of digits by class: straight paths from image to noise, and a network that predicts their velocity."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from digits_training.training import Training

CLASSES = 10  # the digits; index 10 is the null class of classifier-free guidance
TIMESTEPS = 1000  # the network's timestep at pure noise
DROPPED = 0.1  # share of labels replaced by the null class (arXiv 2207.12598, section 3.2)
Images = Float[Tensor, "batch 1 height width"]


def noisy_images(images: Images, noise: Images, s: Float[Tensor, "batch"]) -> Images:
    """Points of the straight paths, (1 - s) image + s noise (arXiv 2209.03003, section 2).

    `s` is 0 at the image, 1 at the noise.
    """
    s = s[:, None, None, None]
    return (1 - s) * images + s * noise


def velocity(images: Images, noise: Images) -> Images:
    """Derivative of the straight paths with respect to `s`: noise - image, the same at every `s`."""
    return noise - images


def draw_times(count: int, device: torch.device | None = None) -> Float[Tensor, "count"]:
    """Positions on the paths in (0, 1): sigmoid of a standard normal variable (arXiv 2403.03206, section 3.1)."""
    return torch.randn(count, device=device).sigmoid()


def drop_labels(labels: Int[Tensor, "batch"], share: float = DROPPED) -> Int[Tensor, "batch"]:
    """Labels of which a random `share`, 0 to 1, is replaced by the null class."""
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < share, CLASSES)


def start_at_identity(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Set modulation and final projection to zero, in place: adaLN-zero (arXiv 2212.09748, section 3.2).

    Every block then passes its input on, and the velocity is zero.
    """
    blocks: Any = dit.transformer_blocks
    for linear in (*(block.norm1.linear for block in blocks), dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return dit


def keep_labels(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Turn off the label dropout of diffusers, in place: in train mode each block would draw its own."""
    blocks: Any = dit.transformer_blocks
    for block in blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return dit


class RectifiedFlowTraining(Training):
    """Mean squared error of the predicted velocity (arXiv 2209.03003, equation 1), with times drawn logit-normally."""

    def __init__(self, dit: DiTTransformer2DModel, steps: int) -> None:
        super().__init__(keep_labels(start_at_identity(dit)), steps, weight_decay=0.0)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch[0].float() / 127.5 - 1, drop_labels(batch[1])
        noise, s = torch.randn_like(images), draw_times(len(images), images.device)
        predicted = self.network(noisy_images(images, noise, s), timestep=s * TIMESTEPS, class_labels=labels).sample
        loss = F.mse_loss(predicted, velocity(images, noise))
        self.log("loss", loss, prog_bar=True)
        return loss
