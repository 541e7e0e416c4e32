"""Where trained ranges start, against loops."""

import math
import statistics

import pytest
import torch

from tfmq_exp.quant.observers import AbsMax, Constant, LSQInit, MeanStd, Observer, Percentile
from tfmq_exp.quant.qat_functions import Lsq
from tfmq_exp.quant.qat_quantizers import TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import IntRangeKind, QuantSpec, Scheme, int_range


def activations() -> torch.Tensor:
    return 1.7 * torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)) - 0.4


def step(start: Observer, scheme: Scheme = "symmetric", bits: int = 4, kind: IntRangeKind = "narrow") -> float:
    """The step that an activation quantizer starts with."""
    form = Lsq(kind)
    quantizer = TrainableQuantizer(
        EMARange(StaticConfig(observer=start, int_range=kind), QuantSpec(bits, scheme)), form
    )
    quantizer.observe(activations())
    return float(quantizer.scale_provider.scale)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_lsq_starts_at_twice_the_mean_magnitude_over_the_root_of_the_largest_code(bits: int) -> None:
    mean = statistics.fmean(abs(float(x)) for x in activations().flatten())
    assert step(LSQInit(), bits=bits) == pytest.approx(2 * mean / math.sqrt(2 ** (bits - 1) - 1), rel=1e-5)
    assert step(LSQInit(), "unsigned", bits) == pytest.approx(2 * mean / math.sqrt(2**bits - 1), rel=1e-5)


@pytest.mark.parametrize(("kind", "signed", "unsigned"), [("narrow", 7, 15), ("full", 7, 15), ("tdq_release", 6, 14)])
def test_the_largest_code_stands_for_the_whole_range(kind: IntRangeKind, signed: int, unsigned: int) -> None:
    largest = max(abs(float(x)) for x in activations().flatten())
    assert step(AbsMax(), kind=kind) == pytest.approx(largest / signed, rel=1e-5)
    assert step(AbsMax(0.9), "unsigned", kind=kind) == pytest.approx(0.9 * largest / unsigned, rel=1e-5)
    assert step(Constant(3.0, 6.0), kind=kind) == pytest.approx(3.0 / signed, rel=1e-5)
    assert step(Constant(3.0, 6.0), "unsigned", kind=kind) == pytest.approx(6.0 / unsigned, rel=1e-5)


def test_tdq_starts_at_mean_and_deviations_of_samples() -> None:
    rows = [[float(x) for x in row.flatten()] for row in activations()]
    mean = statistics.fmean(statistics.fmean(row) for row in rows)
    deviation = statistics.fmean(statistics.stdev(row) for row in rows)
    assert mean < 0
    assert step(MeanStd()) == pytest.approx((-mean + 3 * deviation) / 7, rel=1e-4)
    assert step(MeanStd(signed_mean=True)) == pytest.approx((mean + 3 * deviation) / 7, rel=1e-4)
    assert step(MeanStd(), "unsigned") == pytest.approx((-mean + 16 * deviation) / 15, rel=1e-4)


def test_duq_starts_at_a_percentile_of_positive_values() -> None:
    values = [float(x) for x in activations().flatten()]
    positive, magnitudes = sorted(x for x in values if x > 0), sorted(map(abs, values))
    assert step(Percentile(0.95)) == pytest.approx(positive[int(0.95 * len(positive))] / 7, rel=1e-5)
    assert step(Percentile(0.5, positive_only=False)) == pytest.approx(magnitudes[len(values) // 2] / 7, rel=1e-5)
    lo, hi = Percentile(1.0)(-activations().abs() - 1, QuantSpec(4, "symmetric"))
    assert float(hi) == -float(lo) == pytest.approx(max(magnitudes) + 1)


@pytest.mark.parametrize("axis", [0, None])
def test_a_weight_starts_channel_by_channel(axis: int | None) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 7).reshape(
        6, 1, 1, 1
    )
    for kind in ("full", "narrow", "tdq_release"):
        spec = QuantSpec(4, "symmetric", axis=axis)
        quantizer = TrainableWeightQuantizer(weight, spec, AbsMax(0.9), Lsq(kind))  # type: ignore[arg-type]
        quantizer.observe(weight)
        high = int_range(spec, kind).qmax  # type: ignore[arg-type]
        rows = weight if axis == 0 else weight[None]
        expected = [0.9 * max(abs(float(x)) for x in row.flatten()) / high for row in rows]
        assert quantizer.scale.shape == spec.range_shape(weight.shape)
        assert quantizer.scale.flatten().tolist() == pytest.approx(expected)
        assert quantizer.ints.num_values == weight.numel() // len(expected)
