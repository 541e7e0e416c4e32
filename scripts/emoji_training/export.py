"""The shipped folder, from the newest checkpoints: pipeline, classifier, statistics of the pictures, prompts and samples."""

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from digits_training.training import write_log
from jaxtyping import UInt8
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from emoji_training.autoencoder import build_autoencoder, encode
from emoji_training.denoiser import build_scheduler, build_unet
from emoji_training.pictures import Emoji, held_out_names, in_random_order, load_pictures, read_emojis, without_flags
from emoji_training.text import build_text_encoder
from tfmq_exp.core.files import read_json, sha256_of, write_json
from tfmq_exp.denoisers.emoji import CLASSIFIER, EmojiClassifier
from tfmq_exp.evaluation.metrics import FeatureMoments
from tfmq_exp.report.figures import mosaic

PREFIX = "network."
CALIBRATION = 128  # names for calibration
GUIDANCE, STEPS = 3.0, 30  # of the samples
SHOWN = (
    *("red heart", "blue heart", "crying face", "smiling face with sunglasses", "pouting face", "cat face", "dog face"),
    *("pizza", "strawberry", "red apple", "hot beverage", "soccer ball", "rainbow", "sun with face"),
    *("black large square", "large orange circle", "clock face two oclock", "key", "automobile", "rocket"),
    *("christmas tree", "mushroom", "butterfly", "octopus", "woman", "man", "guitar", "envelope", "house building"),
    *("police officer", "wrapped present", "umbrella"),
)


def averaged_state(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint of Lightning; FileNotFoundError where the network is yet to be trained."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"no {checkpoint}: train the {checkpoint.parent.name} first")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def steps_of(checkpoint: Path) -> int:
    """Steps of the optimiser behind a checkpoint."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def averaged_autoencoder(out: Path, emojis: Sequence[Emoji]) -> AutoencoderKL:
    """The trained autoencoder, with the factor that brings latents of these pictures to variance 1."""
    autoencoder = build_autoencoder()
    autoencoder.load_state_dict(averaged_state(out / "autoencoder" / "last.ckpt"))
    autoencoder.eval().requires_grad_(False)
    latents = encode(autoencoder, load_pictures(emojis))
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
    return autoencoder


def pipeline_of(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The pipeline of diffusers, without a safety checker."""
    parts: Any = (autoencoder, text_encoder, tokenizer, unet, build_scheduler(), None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def averaged_pipeline(out: Path, trained: Sequence[Emoji]) -> StableDiffusionPipeline:
    """The pipeline of diffusers from the checkpoints and the tokenizer under `out`."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    state = averaged_state(out / "denoiser" / "last.ckpt")
    for name, network in (("unet", unet), ("text_encoder", text_encoder)):
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        network.load_state_dict(own)
        network.eval().requires_grad_(False)
    return pipeline_of(averaged_autoencoder(out, trained), text_encoder, tokenizer, unet)


def save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline whose weights take 16 bits each, and are read as float32 where no type is asked for."""
    pipeline.to(torch.float16).save_pretrained(folder)
    file = folder / "text_encoder" / "config.json"  # transformers reads the type from here, diffusers has float32
    write_json(file, {**read_json(file), "dtype": "float32"})


@torch.no_grad()
def write_reference(classifier: EmojiClassifier, pictures: UInt8[Tensor, "pictures 3 64 64"], path: Path) -> None:
    """Write moments of the classifier's features of real pictures, as guided-diffusion does."""
    arrays = dict[str, np.ndarray]()
    for suffix, features in zip(("", "_s"), classifier(pictures)[:2], strict=True):
        moments = FeatureMoments(features.shape[1])
        moments.update(features)
        mean, covariance = moments.compute()
        arrays |= {f"mu{suffix}": mean.numpy(), f"sigma{suffix}": covariance.numpy().astype(np.float32)}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def write_prompts(
    emojis: Sequence[Emoji], held_out: Sequence[str], folder: Path, calibration: int = CALIBRATION
) -> None:
    """Write so many names for calibration, all others for evaluation, and those among them that were held out."""
    trained = in_random_order([emoji.name for emoji in emojis if emoji.name not in held_out])
    files = {
        "calibration": trained[:calibration],
        "evaluation": in_random_order([*trained[calibration:], *held_out]),
        "held_out": held_out,
    }
    for name, prompts in files.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def write_samples(pipeline: StableDiffusionPipeline, prompts: Sequence[str], path: Path, columns: int = 8) -> None:
    """Write a picture with a sample of each prompt, row by row."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i, _ in enumerate(prompts)]
    call: Any = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "np", "generator": generators}
    images: Any = pipeline(list(prompts), **call)[0]
    grid = mosaic((images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2), columns=columns, gap=1)
    Image.fromarray(grid).save(path)


def export(args: argparse.Namespace) -> None:
    """Write everything that the project ships of the model to `args.weights`."""
    folder, everything = args.weights, read_emojis(args.package)
    emojis = without_flags(everything)
    held_out = held_out_names(emojis)
    pipeline = averaged_pipeline(args.out, [emoji for emoji in emojis if emoji.name not in held_out])
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(pipeline, SHOWN, folder / "samples.png")
    write_samples(pipeline, held_out[:32], folder / "samples_held_out.png")
    save_half(pipeline, folder)
    classifier = EmojiClassifier()
    classifier.load_state_dict(averaged_state(args.out / "classifier" / "last.ckpt"))
    save_file(classifier.state_dict(), folder / CLASSIFIER)
    write_reference(classifier.eval(), load_pictures(emojis), folder / "reference.npz")
    write_prompts(emojis, held_out, folder)
    for name in ("autoencoder", "classifier", "denoiser"):
        write_log(args.out / name, folder / f"{name}.log.csv")
    weights = sorted(folder.rglob("*.safetensors"))
    record = {
        "command": f"python scripts/train_emoji.py PACKAGE --seed {args.seed}",
        "pictures": "emoji-datasource-google 16.0.0: Noto Emoji, Apache-2.0",
        "steps": {name: steps_of(args.out / name / "last.ckpt") for name in ("autoencoder", "classifier", "denoiser")},
        "parameters": {
            name: sum(p.numel() for p in getattr(pipeline, name).parameters())
            for name in ("vae", "unet", "text_encoder")
        },
        "sha256": {path.relative_to(folder).as_posix(): sha256_of(path) for path in weights},
        "samples": {"prompts": SHOWN, "guidance": GUIDANCE, "ddim_steps": STEPS, "seeds": "0, 1, 2, ..."},
        "versions": {p: version(p) for p in ("torch", "diffusers", "pytorch-lightning", "transformers", "tokenizers")},
        "machine": platform.machine(),
    }
    write_json(folder / "record.json", record)
