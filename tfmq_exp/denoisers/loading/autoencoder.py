"""LDM's autoencoders (its first stages) as diffusers networks, and latents to images.

Architecture and keys of `ldm.models.autoencoder`: VQModelInterface (VQ-f4) and AutoencoderKL (KL-f8). Outputs agree with
the originals to float32 rounding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import COUNT, POSITIVE, Kind, number, sequence_of
from tfmq_exp.denoisers.loading.checkpoint import assign_weights
from tfmq_exp.denoisers.originals.compvis_unet import DDIM_SETTINGS, block_types, ddim_key, renamed

FINITE = Kind("a finite number", number)
KINDS = ("VQModelInterface", "VQModel", "AutoencoderKL")


def check_latent_scale(config: Mapping[str, Any], file: Path) -> None:
    """ValueError, with the file and the key, for latents that are divided by nothing or by what is no number."""
    if "scaling_factor" in config and not POSITIVE.fits(scale := config["scaling_factor"]):
        raise ValueError(f"{file}: scaling_factor must be {POSITIVE.right}, got {scale!r:.40}")
    if (shift := config.get("shift_factor")) is not None and not number(shift):
        raise ValueError(f"{file}: shift_factor must be a finite number or null, got {shift!r:.40}")
    for key, right in (("latents_mean", FINITE), ("latents_std", POSITIVE)):
        values = config.get(key)
        if values is not None and not sequence_of(right).fits(values):
            raise ValueError(f"{file}: {key} must be {sequence_of(right).right}, got {values!r:.80}")


class LatentDecoder:
    """First stage of a denoiser whose samples are the latents of an autoencoder, times a scale that gives them unit variance.

    The autoencoder moves to the device of its inputs; `rows` images go through it together.
    """

    def __init__(self, autoencoder: AutoencoderKL | VQModel, scale: float, rows: int = 8) -> None:
        for name, value, kind in (("the latents' scale factor", scale, POSITIVE), ("decode_rows", rows, COUNT)):
            if not kind.fits(value):
                raise ValueError(f"{name} must be {kind.right}, got {value!r}")
        self.autoencoder: Any = autoencoder
        self.scale, self.rows = scale, rows

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        config = self.autoencoder.config
        return config.get("vq_embed_dim") or config["latent_channels"]

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Images of latents, nominally in [-1, 1]. VQ models look latents up in their codebook first."""
        self.autoencoder.to(x.device)
        return torch.cat([self.autoencoder.decode(part / self.scale).sample for part in x.split(self.rows)])

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Latents of images in [-1, 1]: of VQ models before the codebook, of KL models the mean."""
        self.autoencoder.to(images.device)
        parts = [self.autoencoder.encode(part) for part in images.split(self.rows)]
        found = [part.latents if isinstance(self.autoencoder, VQModel) else part.latent_dist.mean for part in parts]
        return torch.cat(found) * self.scale


def build_autoencoder(config: Mapping[str, Any], scale: float) -> AutoencoderKL | VQModel:
    """The diffusers network of an LDM `first_stage_config`, with random weights; ValueError for settings it cannot have."""
    kind, params = str(config["target"]).rpartition(".")[2], config["params"]
    if kind not in KINDS:
        raise ValueError(f"first stage must be one of {', '.join(KINDS)}, got {config['target']!r}")
    parts, latent = params["ddconfig"], params["ddconfig"]["z_channels"]
    kl = kind == "AutoencoderKL"
    if bool(parts["double_z"]) != kl or (kl and params["embed_dim"] != latent):
        found = f"double_z={parts['double_z']}, z_channels={latent}, embed_dim={params['embed_dim']}"
        raise ValueError(
            f"{kind} with {found}: expected double_z and embed_dim = z_channels if AutoencoderKL, else neither"
        )
    attends = [parts["resolution"] // 2**level in parts["attn_resolutions"] for level in range(len(parts["ch_mult"]))]
    shared: dict[str, Any] = {
        **block_types(attends, sides=("DownEncoder", "UpDecoder")),
        **{ours: parts[theirs] for ours, theirs in DDIM_SETTINGS.items()},
        "block_out_channels": tuple(parts["ch"] * m for m in parts["ch_mult"]),
        "latent_channels": latent,
        **{"norm_num_groups": 32, "sample_size": parts["resolution"], "scaling_factor": scale},
    }
    if kl:
        return AutoencoderKL(**shared)
    return VQModel(**shared, num_vq_embeddings=params["n_embed"], vq_embed_dim=params["embed_dim"])


def load_autoencoder(config: Mapping[str, Any], state: Mapping[str, Tensor], scale: float) -> AutoencoderKL | VQModel:
    """Build the autoencoder of an LDM `first_stage_config` and load its weights, by their original names, strictly.

    Raises:
        ValueError: an architecture that is not known here, or weights that do not fit it.
    """
    try:
        with torch.device("meta"):
            network = build_autoencoder(config, scale)
    except KeyError as error:
        raise ValueError(f"the architecture of the first stage lacks {error}") from error
    levels = len(config["params"]["ddconfig"]["ch_mult"])

    def name_of(key: str) -> str:
        side, _, inner = key.partition(".")
        return f"{side}.{ddim_key(inner, levels)}" if side in ("encoder", "decoder") else key

    kept = {key: value for key, value in state.items() if not key.startswith("loss.")}  # losses of its training
    assign_weights(network, renamed(kept, network, name_of))
    return network
