"""A pretrained denoiser: network, noise schedule, condition encoder, and first stage."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.denoisers.loading.loading_modules import called_within, loading_modules
from tfmq_exp.denoisers.loading.meta_network import move_loaded
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights


def first_argument(network: nn.Module) -> str:
    """Name of a network's noisy input: `sample` of UNets, `hidden_states` of most transformers."""
    return next(iter(inspect.signature(network.forward).parameters))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments from a flat mapping.

    `added_cond_kwargs.time_ids` is the entry `time_ids` of `added_cond_kwargs`, `image_rotary_emb.0` the first of a tuple.
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = tree
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return {
        key: with_tuples(value) if any(name.startswith(f"{key}.") for name in flat) else value
        for key, value in tree.items()
    }


def with_tuples(tree: Any) -> Any:
    """Dicts whose keys are 0, 1, ... as tuples, whatever their order."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: with_tuples(value) for key, value in tree.items()}
    places = [str(i) for i in range(len(inner))]
    return tuple(inner[key] for key in places) if inner and inner.keys() == {*places} else inner


def flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The names of `nested` for keyword arguments that are nested; tuples stay as they are."""
    found = dict[str, Any]()
    for name, value in arguments.items():
        inner = flattened(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{name}.{key}" if key else name: part for key, part in inner.items()}
    return found


@dataclass(frozen=True)
class Conditions:
    """Conditions of the rows of a batch, as further keyword arguments of the network by their names, see `nested`.

    Args:
        given: tensors with a row for each sample.
        null: one row for no condition at all, the other half of classifier-free guidance; empty where a network has no such mode.
        constants: arguments that all rows share: positions of tokens, sizes.
        normalised: the guided prediction is brought to the length of that with the condition, along the last axis.
        guided_channels: how many channels guidance changes, the first; None for those of the sample.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    normalised: bool = False
    guided_channels: int | None = None

    def to(self, device: torch.device) -> "Conditions":
        parts = (self.given, self.null, self.constants)
        moved = ({k: v.to(device) if isinstance(v, Tensor) else v for k, v in p.items()} for p in parts)
        return Conditions(*moved, normalised=self.normalised, guided_channels=self.guided_channels)


class ConditionEncoder(Protocol):
    """Turns labels or captions into arguments of the network."""

    def __call__(self, choices: Sequence[Any]) -> Conditions: ...

    def example(self) -> Conditions: ...  # of one row, to trace the network with

    def to(self, device: torch.device) -> None: ...


class NoConditions:
    """Encoder of a network without conditions."""

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Empty conditions; ValueError if there are any choices, which the network would ignore."""
        if choices:
            given = f"got {choices[0]!r:.60}; leave out captions, model.sampling.conditioning and labels"
            raise ValueError(f"this network is conditioned on nothing, neither class nor caption: {given}")
        return Conditions()

    def example(self) -> Conditions:
        return Conditions()

    def to(self, device: torch.device) -> None:
        pass


class FirstStage(Protocol):
    """Maps the denoiser's space to images, nominally in [-1, 1]."""

    def decode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch 3 height width"]: ...


class Pixels:
    """The denoiser works on images themselves."""

    def decode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return x


def noise_of(output: Float[Tensor, "batch outputs ..."], sample: Float[Tensor, "batch channels ..."]) -> Tensor:
    """The noise channels of a network's output; a network that learned its variance returns that after the noise."""
    return output[:, : sample.shape[1]]


class DenoiserParts(NamedTuple):
    """The fields of a `Denoiser` that are in its files; its name and where it came from are not."""

    network: Any
    sample_shape: tuple[int, ...]
    schedule: Mapping[str, Any]
    encoder: ConditionEncoder
    first_stage: FirstStage


@dataclass(frozen=True)
class Denoiser:
    """A float network with its noise schedule.

    Args:
        sample_shape: of what it denoises, without the batch: channels, height, width of images and latents.
        schedule: arguments of diffusers' schedulers that describe the noise it was trained on.
        weights_sha256: hash of the file that the weights came from; every result carries it.
        encoder: of its conditions.
        first_stage: of latents to images.
        settings: further identification: architecture, EMA or last weights.
        shards: files of the network's weights where it is on the meta device, see `loading`.
    """

    name: str
    network: nn.Module
    sample_shape: tuple[int, ...]
    schedule: Mapping[str, Any]
    weights_sha256: str
    encoder: ConditionEncoder = field(default_factory=NoConditions)
    first_stage: FirstStage = field(default_factory=Pixels)
    settings: Mapping[str, Any] = field(default_factory=dict)
    shards: ShardedWeights | None = None

    @property
    def device(self) -> torch.device:
        return self.shards.device if self.shards else next(self.network.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the network and its condition encoder; the first stage follows its input."""
        if self.shards:
            self.shards.device = device
            move_loaded(self.network, device)
        else:
            self.network.to(device)
        self.encoder.to(device)

    def loading(self) -> AbstractContextManager[None]:
        """Inside, the network and its modules can be run; weights that are not in memory are read for each, and freed."""
        if self.shards is None:
            return nullcontext()
        return loading_modules(self.network, self.shards.read, self.shards.device)

    @property
    def call(self) -> Callable[..., Any]:
        """The network as a function, wherever its weights are."""
        return self.network if self.shards is None else called_within(self.network, self.loading)

    @torch.no_grad()
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image, measured on a blank sample."""
        blank = torch.zeros(1, *self.sample_shape, device=self.device)
        return tuple(self.first_stage.decode(blank).shape[1:])

    def example(self, timestep: float = 0) -> dict[str, Any]:
        """Keyword arguments of one forward pass, batch of one; the timestep is int64, or float32 of a float."""
        sample = torch.randn(1, *self.sample_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        conditions = self.encoder.example().to(self.device)
        kind = torch.float32 if isinstance(timestep, float) else torch.int64
        t = torch.full((1,), timestep, dtype=kind, device=self.device)
        arguments = nested({**conditions.given, **conditions.constants})
        return {first_argument(self.network): sample, "timestep": t, **arguments}
