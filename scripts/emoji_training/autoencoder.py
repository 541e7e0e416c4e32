"""Training of the autoencoder (arXiv 2112.10752, section 3.1, without its adversary)."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from digits_training.training import Training
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from emoji_training.pictures import SIZE

CHANNELS = 8  # of the latents
SIDE = 8  # pixels of the latents
LARGEST_SHIFT = 4  # pixels
KL = 5e-4  # weight of the mean divergence of a latent value from the standard normal distribution
Pictures = UInt8[Tensor, "batch 3 64 64"]
Images = Float[Tensor, "batch 3 64 64"]


def build_autoencoder() -> AutoencoderKL:
    """Pictures of 64x64 to latents of 8x8x8 and back: 1.0 M parameters, no attention."""
    widths: Any = (16, 32, 64, 64)  # annotated as a tuple of one there, and so are the types
    down: Any = ("DownEncoderBlock2D",) * len(widths)
    up: Any = ("UpDecoderBlock2D",) * len(widths)
    return AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def as_floats(pictures: Pictures) -> Images:
    """Values from 0 .. 255 to -1 .. 1."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Pictures, rows: int = 128) -> Float[Tensor, "batch 8 8 8"]:
    """The latents' means, not scaled, of so many pictures at a time."""
    parts: list[Any] = [autoencoder.encode(as_floats(part)) for part in pictures.split(rows)]
    return torch.cat([part.latent_dist.mode() for part in parts])


def shift(pictures: Pictures, offsets: Int[Tensor, "batch 2"]) -> Pictures:
    """Move each picture by its own rows and columns, at most `LARGEST_SHIFT` either way; white comes in from the edge."""
    padded = F.pad(pictures, (LARGEST_SHIFT,) * 4, value=255)
    pixels = torch.arange(SIZE, device=pictures.device) + LARGEST_SHIFT
    rows, columns = (pixels - offset[:, None] for offset in offsets.unbind(1))
    return padded.permute(0, 2, 3, 1)[
        torch.arange(len(pictures))[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def random_shift(pictures: Pictures) -> Pictures:
    """Move each picture by its own random number of rows and columns."""
    return shift(pictures, torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (len(pictures), 2)))


def edges(images: Images) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring rows, and of neighbouring columns."""
    return images.diff(dim=2), images.diff(dim=3)


class AutoencoderTraining(Training):
    """Absolute error of pixels and of edges, and a little of the latents' divergence from a normal distribution."""

    def __init__(self, steps: int) -> None:
        super().__init__(build_autoencoder(), steps, weight_decay=0.0)

    def training_step(self, batch: tuple[Tensor], _: int) -> Tensor:
        images = as_floats(random_shift(batch[0]))
        network: Any = self.network
        posterior = network.encode(images).latent_dist
        decoded = network.decode(posterior.sample()).sample.float()
        error = F.l1_loss(decoded, images)
        edge_error = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
        divergence = posterior.kl().mean() / (CHANNELS * SIDE * SIDE)
        self.log("loss", error, prog_bar=True)
        self.log("divergence", divergence)
        return error + edge_error + KL * divergence
