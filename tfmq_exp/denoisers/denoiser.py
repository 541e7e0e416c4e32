"""A pretrained denoiser: the network, what it was trained with, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Denoiser:
    """A float UNet with its noise schedule.

    Args:
        sample_shape: channels, height, width of what it denoises.
        schedule: arguments of diffusers' schedulers that describe the noise it was trained on.
        weights_sha256: hash of the file that the weights came from; every result carries it.
    """

    name: str
    unet: nn.Module
    sample_shape: tuple[int, int, int]
    schedule: Mapping[str, Any]
    weights_sha256: str

    def example(self) -> dict[str, Any]:
        """Keyword arguments of one forward pass, batch of one."""
        device = next(self.unet.parameters()).device
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, *self.sample_shape, generator=generator)
        return {"sample": sample.to(device), "timestep": torch.zeros(1, dtype=torch.long, device=device)}
