"""Training of the denoisers of DDPM: the shipped one, and another as a folder of diffusers."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digits_training.training import Training, save_picture
from tfmq_exp.denoisers.digits import IMAGE_SIZE, load_denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard
from tfmq_exp.sampling.samplers import DDIM


class DenoiserTraining(Training):
    """The simple loss of DDPM (arXiv 2006.11239, eq. 14): predict the noise at a uniformly drawn timestep."""

    def __init__(self, network: Any, schedule: Any, steps: int) -> None:
        super().__init__(network.to(memory_format=torch.channels_last), steps, weight_decay=0.0)
        self.schedule = schedule

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images = batch[0].float() / 127.5 - 1
        noise = torch.randn_like(images)
        t = torch.randint(0, self.schedule.config["num_train_timesteps"], (len(images),), device=images.device)
        timesteps: Any = t  # annotated as an IntTensor there
        noisy = self.schedule.add_noise(images, noise, timesteps).to(memory_format=torch.channels_last)
        loss = F.mse_loss(self.network(noisy, t).sample, noise)
        self.log("loss", loss, prog_bar=True)
        return loss


def build_pipeline() -> Any:
    """Another denoiser, 1.1 M parameters: scale and shift by the temporal feature, two layers in a block, a cosine schedule."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # after tfmq_exp, which silences its warnings

    network = UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    return DDPMPipeline(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False))


def save_samples(weights: Path, steps: int = 50) -> None:
    """64 samples of the trained denoiser by deterministic DDIM, as one picture."""
    denoiser = load_denoiser(str(weights / "denoiser.safetensors"))
    sampling, plan = Sampling(DDIM(steps)), ImagePlan(64, seed=0, batch=64)
    images = sample_shard(sampling.predictor(denoiser.network), denoiser, sampling, plan, range(64))
    save_picture(images.numpy(), 16, weights / "denoiser.png")
