"""Integers on a CPU by OpenVINO: one file of a graph, one of constants, and nothing of this program to run them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

from tfmq_exp.deploy.convert import Converted, converted
from tfmq_exp.deploy.engine import Prediction, rows_by_step, write_manifest
from tfmq_exp.deploy.execution import check_integer, counted, executed
from tfmq_exp.deploy.loader import FORMAT, Deployed, settings
from tfmq_exp.deploy.pairs import pairs_saturate
from tfmq_exp.deploy.sites import examine, table
from tfmq_exp.deploy.sizes import stored_bytes
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


def export(
    model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path, *, halves: bool, threads: int | None = None
) -> Converted:
    """Write a finished model for OpenVINO; every layer that fits is checked to be executed in integers here.

    Args:
        model: weights frozen, sources merged, bits chosen; or what `artifact.load` returns.
        example: keyword arguments of a forward pass; shapes but the batch are the exported model's.
        folder: gets `model.xml`, `model.bin` and `deployed.json`.
        halves: execute weights above 64 in two halves, which is exact also where pairs of products saturate.
        threads: of the check; None leaves them to OpenVINO.

    Raises:
        ValueError: a layer that fits is executed in another way, or is not called exactly once.
    """
    model.require_calibrated()
    sites = examine(model)
    found = converted(model, sites, example, pairs_saturate=halves)
    ov.save_model(found.model, folder / "model.xml", compress_to_fp16=False)
    content: dict[str, Any] = {
        "format": FORMAT,
        "timesteps": list(model.context.timesteps),
        "halves": halves,
        "openvino": ov.__version__,
        "settings": settings(threads, "f32"),
        "bytes": stored_bytes(found.model),
        "sites": table(model, sites),
    }
    write_manifest(folder, content)
    graph = executed(Deployed(folder, batch=len(example["sample"]), threads=threads).compiled)
    check_integer(graph, found.products)
    write_manifest(folder, {**content, "kernels": counted(graph)})
    return found


class OpenVINODenoiser(nn.Module):
    """An exported model, called like a diffusers UNet with tensors."""

    def __init__(self, deployed: Deployed, model: QuantizedUNet) -> None:
        super().__init__()
        self.deployed, self.model = deployed, (model,)  # a tuple: not a part of this module

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Prediction:
        """Rows may be at different steps; those of one step go through together."""
        t = torch.as_tensor(timestep).expand(len(sample))
        out = torch.empty_like(sample)
        for step, rows in rows_by_step(self.model[0], t):
            given = {name: value[rows].cpu().numpy() for name, value in conditions.items()}
            noise = self.deployed(sample[rows].cpu().numpy(), self.deployed.timesteps[step], **given)
            out[rows] = torch.from_numpy(noise).to(out)
        return Prediction(out)


@dataclass(frozen=True)
class OpenVINO:
    """`engine=openvino`.

    Args:
        threads: None leaves them to OpenVINO.
        rest: precision of what is not in integers: f32, or bf16, which adds noise of the size of 8-bit activations'.
        halves: see `export`; None asks this processor whether it needs them.
    """

    threads: int | None
    rest: str
    halves: bool | None

    name = "openvino"

    def __post_init__(self) -> None:
        settings(self.threads, self.rest)

    @property
    def halved(self) -> bool:
        """What `halves` means here."""
        return pairs_saturate() if self.halves is None else self.halves

    @property
    def identity(self) -> Mapping[str, Any]:
        """The version of OpenVINO, how the rest is computed, and in which form large weights are; not the threads."""
        return {"name": self.name, "version": ov.__version__, "rest": self.rest, "halves": self.halved}

    def export(self, model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path) -> None:
        """See `export`."""
        export(model, example, folder, halves=self.halved, threads=self.threads)

    def open(self, model: QuantizedUNet, folder: Path, *, batch: int) -> nn.Module:
        """Compiled for so many rows."""
        return OpenVINODenoiser(Deployed(folder, batch=batch, threads=self.threads, precision=self.rest), model)
