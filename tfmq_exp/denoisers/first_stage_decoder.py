"""The decoder of a denoiser's first stage: taken out, put in, and what it reads."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.denoisers.denoiser import FirstStage
from tfmq_exp.denoisers.families.decoder import Decoder


def autoencoder_of(first_stage: FirstStage) -> Any:
    """The autoencoder of a first stage; ValueError for one that has none."""
    if (found := getattr(first_stage, "autoencoder", None)) is None:
        raise ValueError("the model works on pixels: it has no first stage that could be quantized, first_stage=float")
    return found


def with_decoder(first_stage: FirstStage, decoder: Decoder) -> FirstStage:
    """A copy of a first stage that decodes with the parts of another decoder of its autoencoder's class.

    Raises:
        ValueError: of another class, or with other settings.
    """
    own = Decoder(autoencoder_of(first_stage))
    if (own.autoencoder_class, plain(own.config)) != (decoder.autoencoder_class, plain(decoder.config)):
        made = f"{decoder.autoencoder_class} with other settings than the model's {own.autoencoder_class}"
        raise ValueError(f"this decoder is of an {made}")
    memo: dict[int, Any] = {id(part): decoder.get_submodule(name) for name, part in own.named_children()}
    changed: Any = copy.copy(first_stage)
    changed.autoencoder = copy.deepcopy(changed.autoencoder, memo)
    return changed


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without notes of files, lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}


class _ReachedError(Exception):
    """Ends a first stage where its autoencoder begins."""


@torch.no_grad()
def decoder_inputs(first_stage: FirstStage, latents: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Inputs of a first stage's autoencoder for final latents of the sampling loop: unpacked, scaled, shifted."""
    watched: Any = copy.copy(first_stage)
    watched.autoencoder = copy.copy(autoencoder_of(first_stage))
    found: list[Tensor] = []

    def decode(z: Tensor, *_: Any, **__: Any) -> Any:
        found.append(z)
        raise _ReachedError

    watched.autoencoder.decode = decode
    for row in latents.split(1):
        try:
            watched.decode(row)
        except _ReachedError:
            continue
    return torch.cat(found)
