"""OpenVINO engine: a graph and its constants as files that run on a CPU without this program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_exp.deploy.engine import UNetOutput, require_package
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


class OpenVINOUNet(nn.Module):
    """An `ExportedUNet` with the signature of a diffusers UNet, for tensors."""

    def __init__(self, exported: Callable[..., np.ndarray]) -> None:
        super().__init__()
        self.exported = exported

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> UNetOutput:
        """Rows may be at different timesteps; those of one timestep are computed together."""
        t, out = torch.as_tensor(timestep).expand(len(sample)), torch.empty_like(sample)
        for value in t.unique():
            rows = torch.nonzero(t == value)[:, 0]
            given = {name: condition[rows].cpu().numpy() for name, condition in conditions.items()}
            noise = self.exported(sample[rows].cpu().numpy(), int(value), **given)
            out[rows] = torch.from_numpy(noise).to(out)
        return UNetOutput(out)


@dataclass(frozen=True)
class OpenVINO:
    """`engine=openvino`; the optional package is imported where it is used, after a check that it is installed.

    Args:
        threads: None leaves the number to OpenVINO.
        float_precision: of the floating-point part: f32, or bf16, which adds noise as large as that of 8-bit activations.
        split_int8_weights: see `export`; None measures whether this processor needs it.
    """

    threads: int | None
    float_precision: str
    split_int8_weights: bool | None

    name = "openvino"

    def __post_init__(self) -> None:
        require_package("openvino")
        from tfmq_exp.deploy.openvino.runtime import compile_settings

        compile_settings(self.threads, self.float_precision)

    @cached_property
    def splits_int8_weights(self) -> bool:
        """`split_int8_weights` on this processor."""
        from tfmq_exp.deploy.openvino.export import pairs_saturate

        return pairs_saturate() if self.split_int8_weights is None else self.split_int8_weights

    @cached_property
    def bf16_attention(self) -> bool:
        """Whether attention is faster in bfloat16 on this processor."""
        from tfmq_exp.deploy.openvino.runtime import bf16_attention_pays

        return bf16_attention_pays()

    @property
    def identity(self) -> Mapping[str, Any]:
        """Version of OpenVINO, precisions, and whether weights are split; not the threads."""
        settings = {"float_precision": self.float_precision, "split_int8_weights": self.splits_int8_weights}
        settings |= {"bf16_attention": self.bf16_attention}
        return {"name": self.name, "version": version("openvino"), **settings}

    def export(self, model: QuantizedNetwork, example: Mapping[str, Tensor], folder: Path) -> None:
        from tfmq_exp.deploy.openvino.export import export

        choices = {"split_int8_weights": self.splits_int8_weights, "bf16_attention": self.bf16_attention}
        export(model, example, folder, **choices, threads=self.threads)

    def open(self, model: QuantizedNetwork, folder: Path, *, batch: int) -> nn.Module:
        """Compile the exported model for so many rows."""
        from tfmq_exp.deploy.openvino.runtime import ExportedUNet

        precisions: Any = {"precision": self.float_precision, "bf16_attention": self.bf16_attention}
        return OpenVINOUNet(ExportedUNet(folder, batch=batch, threads=self.threads, **precisions))
