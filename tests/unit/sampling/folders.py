"""Tiny folders of diffusers' layout, with random weights, and what diffusers' own pipelines sample from them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from jaxtyping import UInt8
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.loading.pretrained import load_denoiser
from tfmq_exp.sampling.diffusers_scheduler import read_scheduler
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard

IMAGES, STEPS, SEED, GUIDANCE = 2, 4, 5, 3.0
CAPTIONS = ["a cat", "a dog"]


@dataclass(frozen=True)
class Model:
    """A folder with a scheduler and the denoiser that was loaded from it."""

    folder: Path
    denoiser: Denoiser

    @classmethod
    def saved(cls, folder: Path, save: Callable[[Path], None]) -> "Model":
        """A model that `save` writes, sampled by diffusers' DDIM, loaded under the name of its folder."""
        save(folder)
        put_scheduler(folder, "DDIMScheduler", {})
        return cls(folder, load_denoiser(folder.name.rstrip("0123456789"), folder, None, False))


def save_unconditional(folder: Path) -> None:
    """A network of 8x8 pixels."""
    make_generic(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
        )
    ).save_pretrained(folder / "unet")


def save_text_to_image(folder: Path) -> None:
    """All parts of Stable Diffusion: 4x8x8 latents, 16x16 images, captions of single letters."""
    make_generic(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=12,
        )
    ).save_pretrained(folder / "unet")
    stage = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    make_generic(stage).save_pretrained(folder / "vae")
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=12,
        intermediate_size=24,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=97,
        eos_token_id=98,
        pad_token_id=98,
    )
    make_generic(CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["!", *letters, "!</w>", *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": 97, "<|endoftext|>": 98}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))


def make_generic(network: Any) -> Any:
    """The same network, its vectors moved off the values that they start from, all drawn from one seed."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.eval().requires_grad_(False).parameters():
        scale = 0.2 if parameter.dim() == 1 else 1 / parameter[0].numel() ** 0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.5)
    return network


def put_scheduler(folder: Path, kind: str, settings: dict[str, Any], pipeline: str | None = None) -> None:
    """Describe a folder's scheduler, and its pipeline where it has one."""
    getattr(diffusers, kind)(**settings).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").unlink(missing_ok=True)
    if pipeline is not None:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))


def as_bytes(images: Tensor) -> UInt8[Tensor, "batch channels height width"]:
    """[0, 1] to 0 .. 255, as diffusers' image processors do."""
    return (images * 255).round().to(torch.uint8)


def sample_unconditional(folder: Path, pipeline: str, eta: float) -> Tensor:
    """What a pipeline of diffusers makes of the noise of images 0 and 1."""
    kind = getattr(diffusers, json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"])
    network = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    made = getattr(diffusers, pipeline)(network, kind.from_pretrained(folder / "scheduler"))
    made.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"eta": eta} if pipeline == "DDIMPipeline" else {}
    generators = image_generators(SEED, "images", range(IMAGES))
    found = made(batch_size=IMAGES, generator=generators, num_inference_steps=STEPS, output_type="np", **options).images
    return as_bytes(torch.from_numpy(found).permute(0, 3, 1, 2))


def sample_captions(folder: Path, kind: str) -> Tensor:
    """What StableDiffusionPipeline makes of the same captions and noise."""
    parts: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval(),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval(),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
    }
    made = StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=getattr(diffusers, kind).from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    generators = image_generators(SEED, "images", range(IMAGES))
    latents = initial_noise(generators, (4, 8, 8), torch.device("cpu"))
    found = made(
        CAPTIONS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=latents,
        generator=generators,
        output_type="pt",
    ).images
    return as_bytes(found)


class InTurn:
    """The captions, one after the other."""

    def choose(self, seed: int, stream: str, indices: Any) -> list[str]:
        return [CAPTIONS[i] for i in indices]


def sampled(model: Model, eta: float = 0.0, **how: Any) -> Tensor:
    """The images that a run makes."""
    sampling = Sampling(read_scheduler(str(model.folder), STEPS, eta), **how)
    plan = ImagePlan(IMAGES, SEED, IMAGES)
    return sample_shard(sampling.predictor(model.denoiser.network), model.denoiser, sampling, plan, range(IMAGES))


def check_equal(ours: Tensor, diffusers: Tensor) -> None:
    """At most one grey level; and images, not all black or white."""
    assert (ours.int() - diffusers.int()).abs().max() <= 1
    assert diffusers.float().std() > 10
