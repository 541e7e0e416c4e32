"""Interface of an engine, and the manifest in the folder that it exports to."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tfmq_exp.denoisers.denoiser import Denoiser, first_argument
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

MANIFEST = "deployed.json"


class UNetOutput(NamedTuple):
    """Output of a diffusers UNet, reduced to the field that samplers read."""

    sample: Tensor


class Engine(Protocol):
    """Exports a finished quantized model to files, and opens them as a denoiser that computes with integers."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything besides the model that its results depend on."""
        ...

    def export(self, model: QuantizedNetwork, example: Mapping[str, Tensor], folder: Path) -> None:
        """Fill a folder; `layers` of its manifest is the `layers.layer_report`.

        Args:
            model: finished: weights frozen, scale sources merged.
            example: keyword arguments of a forward pass.
            folder: empty, or with the files of an interrupted export.
        """
        ...

    def open(self, model: QuantizedNetwork, folder: Path, *, batch: int) -> nn.Module:
        """Open an exported model as a module with the signature of the UNet.

        Args:
            model: the model that was exported.
            folder: the folder that `export` has filled.
            batch: rows of one forward pass.
        """
        ...


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of an exported model."""
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an exported model."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def require_package(name: str) -> None:
    """Raise ValueError unless a package is installed; the optional dependency has the same name."""
    try:
        version(name)
    except PackageNotFoundError:
        hint = f"pip install 'tfmq_exp[{name}]'"
        raise ValueError(f"this engine needs {name}, which is not installed: {hint}") from None


def require_executable(denoiser: Denoiser) -> None:
    """ValueError for a network that engines do not execute: all but UNets of a sample, a timestep and a sequence."""
    example, kind = denoiser.encoder.example(), type(denoiser.network).__name__
    others = sorted({*example.given, *example.constants} - {"encoder_hidden_states"})
    if first_argument(denoiser.network) != "sample" or others:
        taken = f", and this one takes {others[0]}" if others else ""
        found = f"engines execute UNets that are conditioned on a sequence or on nothing{taken}"
        raise ValueError(f"{found}: a {kind} is simulated (engine=none)")
