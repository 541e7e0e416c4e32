"""The `quantizers` goldens, and the release's own way to place a grid."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from goldens.comparing import Group, Record, reading
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.histogram_observers import EntropyObserver, HistogramPercentileObserver
from tfmq_exp.quant.observers import LpObserver, MinMax, Observer
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, WeightQuantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QParams, QuantSpec

RELEASED = LpObserver(include_zero=False)
ESTIMATORS: dict[str, Observer] = {
    "minmax": MinMax(),
    "mse": RELEASED,
    "kl": EntropyObserver(),
    "hist": HistogramPercentileObserver(positive_only=True),
}


@dataclass
class Goldens:
    """A folder's tensors by name, and its records."""

    tensors: Record
    meta: Record
    timesteps: Record

    @classmethod
    def load(cls, folder: Path) -> "Goldens":
        """Read every file of a folder.

        Raises:
            DamagedError: a missing folder, or a file that is missing or cannot be parsed.
        """
        with reading(folder):
            meta, timesteps = (
                json.loads((folder / name).read_text(encoding="utf-8"), object_hook=Record)
                for name in ("meta.json", "timestep_maps.json")
            )
            files = sorted(folder.glob("*.safetensors"))
            tensors = Record({key: value for file in files for key, value in load_file(file).items()})
        return cls(tensors, meta, timesteps)


def spec_of(record: Record, bits: int, axis: int | None) -> QuantSpec:
    """The grid that a record describes."""
    scheme = "unsigned" if record.get("always_zero") else "symmetric" if record.get("symmetric") else "affine"
    return QuantSpec(bits, scheme, axis)


def stored(tensors: Record, key: str) -> QParams:
    """A golden scale and zero point."""
    return QParams(tensors[f"{key}.delta"], tensors[f"{key}.zero_point"])


def at(rounding: AdaRound, v: Tensor) -> AdaRound:
    """The same rounding at another point."""
    with torch.no_grad():
        rounding.v.copy_(v)
    return rounding


def weight_quantizer(weight: Tensor, bits: int, group: Group, key: str, tensors: Record) -> WeightQuantizer:
    """A quantizer placed on a weight as the release does, compared with the golden scale and zero point."""
    quantizer = WeightQuantizer(weight, QuantSpec(bits, axis=0), RELEASED)
    quantizer.observe(weight)
    quantizer.mode = Mode.QUANTIZE
    for ours, golden in zip(quantizer.qparams, stored(tensors, key), strict=True):
        group.compare(ours, golden)
    return quantizer


def on_grid(x: Tensor, spec: QuantSpec) -> Tensor:
    """A tensor on the grid of its own range, as the release finds it."""
    return fake_quantize(x, qparams_from_range(*RELEASED(x, spec), spec), spec)


def place(x: Tensor, spec: QuantSpec, group: Group, key: str, tensors: Record) -> Tensor:
    """`on_grid`, and compare scale and zero point."""
    q = qparams_from_range(*RELEASED(x, spec), spec)
    for ours, golden in zip(q, stored(tensors, key), strict=True):
        group.compare(ours, golden)
    return fake_quantize(x, q, spec)


def input_quantizer(x: Tensor, spec: QuantSpec, group: Group, key: str, tensors: Record) -> AffineQuantizer:
    """A quantizer placed on an activation as the release does, compared with the golden scale and zero point."""
    quantizer = AffineQuantizer(EMARange(StaticConfig(), spec))
    for name, ours, golden in zip(
        ("scale", "zero_point"), qparams_from_range(*RELEASED(x, spec), spec), stored(tensors, key), strict=True
    ):
        group.compare(ours, golden)
        getattr(quantizer.scale_provider, name).data.copy_(ours.flatten())
    quantizer.mode = Mode.QUANTIZE
    return quantizer
