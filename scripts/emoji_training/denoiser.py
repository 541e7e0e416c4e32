"""Training of the denoiser of latents, together with the text encoder that conditions it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from digits_training.training import Training
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import CLIPTextModel

from emoji_training.autoencoder import CHANNELS, SIDE, encode, random_shift
from emoji_training.text import WIDTH

DROPPED = 0.1  # share of captions replaced by the empty one (arXiv 2207.12598, section 3.2)
FULL_NAMES = 0.75  # share of captions that are the name; the others are the short name
SHIFTS = 4  # random positions in which the latents of a picture, and of its mirror image, are computed
LARGEST_WEIGHT = 5.0  # signal-to-noise ratio from which on the loss weighs less (arXiv 2303.09556)


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's architecture (arXiv 2112.10752) with two resolutions, 3.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(80, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, by a quirk of diffusers
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, and its settings of DDIM."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def encode_variants(
    autoencoder: AutoencoderKL, pictures: UInt8[Tensor, "pictures 3 64 64"], mirrored: Sequence[bool]
) -> Float[Tensor, "pictures variants 8 8 8"]:
    """Latents of every picture at random positions; of half of them mirrored, where that leaves the name as it is."""
    both = torch.where(torch.tensor(mirrored)[:, None, None, None], pictures.flip(3), pictures)
    variants = [random_shift(source) for source in (pictures, both) for _ in range(SHIFTS)]
    return torch.stack([encode(autoencoder, source) for source in variants], 1)


def loss_weights(alphas: Float[Tensor, "timesteps"], t: Tensor) -> Tensor:
    """Min-SNR weights of the noise's squared error: min(SNR, 5) / SNR (arXiv 2303.09556, section 3.4)."""
    ratio = alphas[t] / (1 - alphas[t])
    return ratio.clamp(max=LARGEST_WEIGHT) / ratio


class DenoiserTraining(Training):
    """Weighted squared error of the predicted noise (arXiv 2006.11239, equation 14) at uniformly drawn timesteps."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, empty: Tensor, steps: int) -> None:
        network = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        super().__init__(network.to(memory_format=torch.channels_last), steps, weight_decay=0.0)
        self.schedule, self.empty = build_scheduler(), empty

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        variants, captions = batch
        network: Any = self.network
        rows, count = torch.arange(len(variants)), len(variants)
        latents = variants[rows, torch.randint(variants.shape[1], (count,))].to(memory_format=torch.channels_last)
        tokens = captions[rows, (torch.rand(count) >= FULL_NAMES).long()]
        tokens = torch.where(torch.rand(count, 1) < DROPPED, self.empty, tokens)
        noise, t = torch.randn_like(latents), torch.randint(len(self.schedule.betas), (count,))
        timesteps: Any = t  # annotated as an IntTensor there
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        states = network["text_encoder"](tokens).last_hidden_state
        predicted = network["unet"](noisy, t, states).sample.float()
        errors = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        self.log("loss", errors.mean(), prog_bar=True)
        return (loss_weights(self.schedule.alphas_cumprod, t) * errors).mean()
