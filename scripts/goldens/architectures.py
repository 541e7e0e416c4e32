"""The networks of the `temporal` goldens: architecture of diffusers, weights and recordings of each."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from goldens.comparing import DamagedError, Record, reading
from goldens.families import read_json, read_recorded
from tfmq_exp.denoisers.denoiser import first_argument, nested
from tfmq_exp.denoisers.families.family import Family
from tfmq_exp.denoisers.families.find import FAMILIES, family_of
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure

GIVEN = "in."  # prefix of the recorded arguments
# PixArt's networks ask for these even where they have no use for them
SIZES = {f"added_cond_kwargs.{name}": None for name in ("resolution", "aspect_ratio")}
POSITIONS = ("img_ids", "txt_ids")  # of the tokens, which all samples share


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A real tensor in another precision; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def in_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network; by torch's own method, for that of diffusers warns of what does not concern it."""
    return nn.Module.to(copy.deepcopy(network), dtype)


def is_constant(name: str, value: Any) -> bool:
    """Whether an argument has no row for each sample."""
    if not isinstance(value, Tensor) or not value.dim():
        return True
    return (name in POSITIONS and value.dim() == 2) or name.startswith("image_rotary_emb.")


@contextmanager
def outputs_of(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Record what each of these modules returned in its latest call."""
    found: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name in names:
            module = network.get_submodule(name)
            hook = module.register_forward_hook(lambda _m, _a, out, _name=name: found.update({_name: out}))
            hooks.enter_context(hook)
        yield found


@dataclass(frozen=True)
class Architecture:
    """One network.

    Args:
        name: of the files and in the index.
        settings: those of the index.
        network: with its weights, in single precision.
        recorded: inputs and outputs by name.
    """

    name: str
    settings: Record
    network: nn.Module
    recorded: Record

    @property
    def family(self) -> Family:
        """Its family: roles, blocks and temporal features."""
        return family_of(self.network)

    @cached_property
    def sample(self) -> str:
        """Name of its noisy input."""
        return first_argument(self.network)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Its recorded arguments by flat names."""
        names = [key for key in self.recorded if key.startswith(GIVEN)]
        found = {key.removeprefix(GIVEN): self.recorded[key] for key in names}
        usual = SIZES if self.family.network == "PixArtTransformer2DModel" else {}
        return {**usual, **self.settings["scalar_inputs"], **found}

    def variation(self, name: str) -> dict[str, Any]:
        """The arguments with those that a variation replaces; none for an empty name."""
        prefix = f"cond.{name}."
        changed = [key for key in self.recorded if name and key.startswith(prefix)]
        if name and not changed:
            raise DamagedError(f"there is no {prefix}* in the goldens of {self.name}")
        return {**self.arguments, **{key.removeprefix(prefix): self.recorded[key] for key in changed}}

    @cached_property
    def timesteps(self) -> Tensor:
        """The recorded timesteps as the network is given them."""
        return self.recorded["t"].to(getattr(torch, self.settings["timestep_dtype"]))

    def at(self, arguments: Mapping[str, Any], t: Tensor) -> dict[str, Any]:
        """The arguments at one timestep for all rows."""
        name = self.settings["timestep_argument"]
        return {**arguments, name: torch.full_like(arguments[name], t.item())}

    def conditions(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those that its temporal features depend on beside the timestep."""
        return {name: arguments[name] for name in self.family.conditions if arguments.get(name) is not None}

    @torch.no_grad()
    def run(self, arguments: Mapping[str, Any], network: nn.Module | None = None) -> Tensor:
        """Output for flat arguments, of its network or of a copy in another precision."""
        used = network or self.network
        dtype = next(used.parameters()).dtype
        return used(**nested({name: cast(value, dtype) for name, value in arguments.items()}))[0]

    @cached_property
    def structure(self) -> NetworkStructure:
        """Roles and blocks of its layers."""
        rows = {name: v if is_constant(name, v) else v[:1] for name, v in self.arguments.items()}
        return read_structure(self.network, nested(rows))


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """The network of a configuration with its weights as float32.

    Raises:
        ValueError: a class that no family is known of, or weights that are missing, unknown or of another shape.
    """
    name, known = config["_class_name"], [family.network for family in FAMILIES]
    if name not in known:
        raise ValueError(f"a {name} is a denoiser of no known family; known: {', '.join(known)}")
    network = getattr(diffusers, name).from_config({k: v for k, v in config.items() if k != "_class_name"})
    network.eval().requires_grad_(False)
    try:
        network.load_state_dict({key: cast(value, torch.float32) for key, value in weights.items()})
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return network


def read_architecture(folder: Path, name: str, settings: Record) -> Architecture:
    """One entry of the index.

    Raises:
        DamagedError: a file is missing, or the weights are not those of the configuration.
    """
    config, weights = read_json(folder / f"{name}.config.json"), folder / f"{name}.model.safetensors"
    with reading(weights):
        network = build(config, read_recorded(weights))
    return Architecture(name, settings, network, read_recorded(folder / f"{name}.io.safetensors"))
