"""Small stored networks of diffusers with what is recorded of them, and calibration sets of their arguments."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import first_argument, nested
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure

GOLDENS = Path(__file__).parents[1] / "goldens/transformers"
NAMES = tuple(json.loads((GOLDENS / "temporal/index.json").read_text(encoding="utf-8")))
# in these not even the batch of one has a row of its own
SHARED = ("img_ids", "txt_ids")


class Stored(NamedTuple):
    """A network, its flat arguments for two samples, entries of the index, and recorded tensors."""

    name: str
    network: nn.Module
    arguments: dict[str, Any]
    settings: dict[str, Any]
    recorded: dict[str, Tensor]

    @property
    def first(self) -> str:
        return first_argument(self.network)

    @property
    def timesteps(self) -> Tensor:
        """Recorded timesteps as the network takes them."""
        return self.recorded["t"].to(getattr(torch, self.settings["timestep_dtype"]))

    def structure(self) -> NetworkStructure:
        return read_structure(self.network, self.calibration([0]).inputs(torch.device("cpu")))

    def calibration(self, samples: list[int] | None = None, seed: int | None = None) -> CalibrationSet:
        """The recorded samples, or some of them; with a seed, other noise at every recorded timestep."""
        given = dict(self.arguments)
        x, t = given.pop(self.first), given.pop("timestep")
        constants = {k: v for k, v in given.items() if not isinstance(v, Tensor) or k in SHARED}
        conditions = {k: v for k, v in given.items() if k not in constants}
        rows = torch.arange(len(x)) if samples is None else torch.tensor(samples)
        if seed is not None:
            rows = rows.repeat(len(self.timesteps))
            x = torch.randn(len(rows), *x.shape[1:], generator=torch.Generator().manual_seed(seed))
            t = self.timesteps.repeat_interleave(len(rows) // len(self.timesteps))
        else:
            x, t = x[rows], t[rows]
        t = t.double() if t.is_floating_point() else t
        return CalibrationSet(x, t, torch.zeros_like(rows), rows, conditions, rows, constants, self.first)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """The real tensors of a structure in another precision."""
    real = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
    return pytree.tree_map(lambda x: x.to(dtype) if real(x) else x, tree)


@cache
def read_stored(name: str) -> Stored:
    """One of `NAMES`. Shared by all tests: copy it before changing it."""
    folder = GOLDENS / "temporal"
    config = json.loads((folder / f"{name}.config.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "index.json").read_text(encoding="utf-8"))[name]
    network = getattr(diffusers, config.pop("_class_name")).from_config(config).eval().requires_grad_(False)
    network.load_state_dict(cast(load_file(folder / f"{name}.model.safetensors"), torch.float32))
    recorded = load_file(folder / f"{name}.io.safetensors")
    arguments: dict[str, Any] = {k.removeprefix("in."): v for k, v in recorded.items() if k.startswith("in.")}
    if name == "pixart_sigma":  # it asks for sizes that it has no use for
        arguments |= {"added_cond_kwargs.resolution": None, "added_cond_kwargs.aspect_ratio": None}
    return Stored(name, network, {**arguments, **settings["scalar_inputs"]}, settings, recorded)


def outputs_inside(network: nn.Module, names: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """What modules return while the network runs, by name."""
    found: dict[str, Any] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _m, _a, out, _n=name: found.update({_n: out}))
        for name in names
    ]
    with torch.no_grad():
        network(**nested(arguments))
    for hook in hooks:
        hook.remove()
    return found
