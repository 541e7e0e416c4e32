"""The shipped folder, from the newest checkpoints."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from emoji_training.autoencoder import as_floats, build_autoencoder
from emoji_training.pictures import Emoji, load_pictures

PREFIX = "network."


def averaged_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint of Lightning; FileNotFoundError where the network is yet to be trained."""
    if not checkpoint.exists():
        raise FileNotFoundError(f"no {checkpoint}: train the {checkpoint.parent.name} first")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


@torch.no_grad()
def averaged_autoencoder(out: Path, emojis: Sequence[Emoji]) -> AutoencoderKL:
    """The trained autoencoder, with the factor that brings latents of these pictures to variance 1."""
    autoencoder = build_autoencoder()
    autoencoder.load_state_dict(averaged_state(out / "autoencoder" / "last.ckpt"))
    autoencoder.eval().requires_grad_(False)
    pictures = load_pictures(emojis)
    latents = torch.cat([autoencoder.encode(as_floats(part)).latent_dist.mode() for part in pictures.split(128)])
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
    return autoencoder


def export(args: argparse.Namespace) -> None:
    raise NotImplementedError
