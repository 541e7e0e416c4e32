"""A pretrained denoiser: the network, what it was trained with, what it is told, and what turns its output into images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditions:
    """What the rows of a batch are conditioned on, as further keyword arguments of the UNet.

    Args:
        given: by name, row by row.
        null: the same for no condition at all (the other half of classifier-free guidance), one row, which is that of all;
            empty where the network has no such mode.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Conditions":
        """The same on another device."""
        given, null = ({k: v.to(device) for k, v in part.items()} for part in (self.given, self.null))
        return Conditions(given, null)


class ConditionEncoder(Protocol):
    """Turns labels or captions into what the UNet understands."""

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of as many rows as there are choices."""
        ...

    def example(self) -> Conditions:
        """Conditions of one row, to trace the network with."""
        ...

    def to(self, device: torch.device) -> None:
        """Work on another device from now on."""
        ...


class NoConditions:
    """Of a network that is told nothing but the timestep."""

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Empty; ValueError if anything was chosen, which the network would never hear of."""
        if choices:
            raise ValueError(
                f"this network is conditioned on nothing, neither class nor caption: got {choices[0]!r:.60}; leave out "
                "captions, model.sampling.conditioning and labels"
            )
        return Conditions()

    def example(self) -> Conditions:
        """Empty."""
        return Conditions()

    def to(self, device: torch.device) -> None:
        """Nothing to move."""


class FirstStage(Protocol):
    """What stands between the denoiser's space and images."""

    def decode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch 3 height width"]:
        """Images, nominally in [-1, 1]."""
        ...


class Pixels:
    """The denoiser works on images themselves."""

    def decode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """As they are."""
        return x


def noise_of(
    output: Float[Tensor, "batch outputs ..."], sample: Float[Tensor, "batch channels ..."]
) -> Float[Tensor, "batch channels ..."]:
    """The noise in what a network returned for a sample; one that learned its variance returns that behind the noise."""
    return output[:, : sample.shape[1]]


class DenoiserParts(NamedTuple):
    """The fields of a `Denoiser` that are in its files; its name and where it came from are not."""

    unet: Any
    sample_shape: tuple[int, int, int]
    schedule: Mapping[str, Any]
    encoder: ConditionEncoder
    first_stage: FirstStage


@dataclass(frozen=True)
class Denoiser:
    """A float UNet with its noise schedule.

    Args:
        sample_shape: channels, height, width of what it denoises.
        schedule: arguments of diffusers' schedulers that describe the noise it was trained on.
        weights_sha256: hash of the file that the weights came from; every result carries it.
        encoder: of what it can be conditioned on.
        first_stage: of latents to images.
        settings: what else identifies it, beside the file: architecture, EMA or last weights.
    """

    name: str
    unet: nn.Module
    sample_shape: tuple[int, int, int]
    schedule: Mapping[str, Any]
    weights_sha256: str
    encoder: ConditionEncoder = field(default_factory=NoConditions)
    first_stage: FirstStage = field(default_factory=Pixels)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.unet.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the network and what encodes its conditions; the first stage follows what it is given."""
        self.unet.to(device)
        self.encoder.to(device)

    def example(self) -> dict[str, Any]:
        """Keyword arguments of one forward pass, batch of one."""
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, *self.sample_shape, generator=generator)
        conditions = self.encoder.example().to(self.device).given
        return {"sample": sample.to(self.device), "timestep": torch.zeros(1, dtype=torch.long, device=self.device)} | {
            **conditions
        }
