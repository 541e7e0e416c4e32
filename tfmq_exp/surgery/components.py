"""A denoiser with components from artefacts: its first stage's decoder, its text encoders."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.decoder import Decoder
from tfmq_exp.denoisers.first_stage_decoder import with_decoder
from tfmq_exp.denoisers.pipelines.text_components import TEXT_ENCODERS
from tfmq_exp.surgery import serialization


def encoder_names(denoiser: Denoiser) -> tuple[str, ...]:
    """Names of a denoiser's text encoders, as its pipeline has them."""
    return getattr(denoiser.encoder, "text_encoder_names", ())


def read_decoder(path: Path) -> Decoder:
    """The decoder of an artefact; ValueError for another network, or errors of `serialization.load`."""
    if not isinstance(network := serialization.load(path).network, Decoder):
        raise ValueError(f"{path} holds a {type(network).__name__}, not a first stage's decoder")
    return network


def read_text_encoder(path: Path) -> Any:
    """The text encoder of an artefact; ValueError for another network, or errors of `serialization.load`."""
    if (name := type(network := serialization.load(path).network).__name__) not in TEXT_ENCODERS:
        raise ValueError(f"{path} holds a {name}, not a text encoder")
    return network


def with_components(
    denoiser: Denoiser, first_stage: Path | None = None, text_encoders: Mapping[str, Path] | None = None
) -> Denoiser:
    """A denoiser that decodes and encodes with quantized components; what no file is given for stays as it is.

    Args:
        denoiser: the float model of which they were made.
        first_stage: artefact of the decoder.
        text_encoders: artefacts by the names that the pipeline has for its encoders, `text_encoder`, `text_encoder_2`, ...

    Raises:
        ValueError: an artefact that is damaged, of another network or of other settings; a name that the model does not have.
    """
    files, names = dict(text_encoders or {}), encoder_names(denoiser)
    if unknown := files.keys() - names:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise ValueError(f"{denoiser.name} has no text encoder {min(unknown)!r}: {has}")
    if first_stage is not None:
        decoder = read_decoder(first_stage)
        try:
            denoiser = replace(denoiser, first_stage=with_decoder(denoiser.first_stage, decoder))
        except ValueError as error:
            raise ValueError(f"{first_stage}: {error}") from error
    if files:
        encoder: Any = denoiser.encoder
        read = encoder.with_text_encoders(lambda: {name: read_text_encoder(file) for name, file in files.items()})
        denoiser = replace(denoiser, encoder=read)
    return denoiser
