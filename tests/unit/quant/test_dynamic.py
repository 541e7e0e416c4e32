"""Ranges at run time, and ranges that several steps share, against loops."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.functional import fake_quantize
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.scales.dynamic import DynamicConfig, DynamicScale
from tfmq_exp.quant.scales.observed_ranges import (
    EMARange,
    PerStepConfig,
    StaticConfig,
    TimestepGroupConfig,
)
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import TimestepContext

TRAIN = 1000
TIMESTEPS = (990, 751, 501, 500, 499, 250, 100, 1)
SCHEMES: list[Scheme] = ["affine", "symmetric", "unsigned"]


def random(*shape: int, scheme: Scheme = "affine") -> Tensor:
    """Rows of very different sizes, one of a single sign and one of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-2, 2, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    x[1], x[2] = x[1].abs() + 0.1, 0
    return x.abs() if scheme == "unsigned" else x


def by_hand(value: float, lo: float, hi: float, bits: int, scheme: Scheme) -> float:
    """The nearest point of the grid that covers [lo, hi] and zero."""
    lo, hi, last = min(lo, 0.0), max(hi, 0.0), 2**bits - 1
    if scheme == "symmetric":
        scale, zero, first, last = 2 * max(-lo, hi) / (2**bits - 2), 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        scale, first = (hi - lo) / last, 0
        zero = round(-lo / scale) if scale else 0
    return scale * (min(max(round(value / scale) + zero, first), last) - zero) if scale else 0.0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5), (4, 3, 2, 2)])
def test_each_sample_has_the_range_of_its_own_values(shape: tuple[int, ...], bits: int, scheme: Scheme) -> None:
    x, spec = random(*shape, scheme=scheme), QuantSpec(bits, scheme)
    quantized = fake_quantize(x, DynamicScale(DynamicConfig("sample"), spec)(x), spec)
    for row, out in zip(x, quantized, strict=True):
        lo, hi = float(row.min()), float(row.max())
        expected = [by_hand(float(value), lo, hi, bits, scheme) for value in row.flatten()]
        assert out.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5), (4, 3, 2, 2)])
def test_a_tensor_has_one_range(shape: tuple[int, ...], bits: int, scheme: Scheme) -> None:
    x, spec = random(*shape, scheme=scheme), QuantSpec(bits, scheme)
    quantized = fake_quantize(x, DynamicScale(DynamicConfig("tensor"), spec)(x), spec)
    lo, hi = float(x.min()), float(x.max())
    expected = [by_hand(float(value), lo, hi, bits, scheme) for value in x.flatten()]
    assert quantized.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_only_a_range_of_its_own_makes_a_sample_independent_of_its_batch() -> None:
    x, spec = random(4, 3, 5), QuantSpec(4)
    for per, independent in (("sample", True), ("tensor", False)):
        source = DynamicScale(DynamicConfig(per), spec)  # type: ignore[arg-type]
        alone = torch.cat([fake_quantize(row, source(row), spec) for row in x.split(1)])
        assert torch.equal(fake_quantize(x, source(x), spec), alone) is independent


def test_dynamic_ranges_need_no_data_and_keep_no_state() -> None:
    source = DynamicScale(DynamicConfig("sample"), QuantSpec(8))
    assert not source.needs_data
    assert source.uncalibrated() == []
    assert not source.state_dict()
    assert not list(source.trainable())
    assert source.tabulated() is source


def test_unknown_extent_is_named() -> None:
    with pytest.raises(ValueError, match="'channel'"):
        DynamicScale(DynamicConfig("channel"), QuantSpec(8))  # type: ignore[arg-type]


# intervals


def rows() -> tuple[Tensor, Tensor]:
    """Three rows for every timestep, in disorder, of very different sizes."""
    t = torch.tensor(TIMESTEPS * 3)
    x = torch.randn(len(t), 5, generator=torch.Generator().manual_seed(1))
    return x * torch.logspace(-2, 2, len(t))[:, None], t


def shown(source: ScaleProvider, context: TimestepContext) -> Tensor:
    """What a source makes of the rows that it was calibrated with."""
    x, t = rows()
    with context.at(t):
        source.observe(x)
        return fake_quantize(x, source(x), source.spec)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 999, 1000])
def test_timestep_reads_interval_floor_of_t_n_over_t(count: int) -> None:
    context, spec = TimestepContext(TIMESTEPS), QuantSpec(8)
    quantized = shown(EMARange(TimestepGroupConfig(count, TRAIN), spec, context), context)
    x, t = rows()
    part = [math.floor(Fraction(int(when) * count, TRAIN)) for when in t]
    for i in range(len(x)):
        together = torch.stack([x[j] for j in range(len(x)) if part[j] == part[i]])
        lo, hi = float(together.min()), float(together.max())
        expected = [by_hand(float(value), lo, hi, 8, "affine") for value in x[i]]
        assert quantized[i].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("count", "entries"), [(1, 1), (2, 2), (4, 4), (10, 7), (1000, 8)])
def test_parts_without_steps_have_no_entry(count: int, entries: int) -> None:
    context = TimestepContext(TIMESTEPS)
    source = EMARange(TimestepGroupConfig(count, TRAIN), QuantSpec(8), context)
    assert len(source.uncalibrated()) == len(source.scale) == entries
    shown(source, context)
    assert source.uncalibrated() == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_interval_is_static(momentum: float) -> None:
    context, spec = TimestepContext(TIMESTEPS), QuantSpec(8)
    one, static = (
        EMARange(TimestepGroupConfig(1, TRAIN, momentum=momentum), spec, context),
        EMARange(StaticConfig(), spec),
    )
    assert torch.equal(shown(one, context), shown(static, context))


@pytest.mark.parametrize(("count", "timesteps"), [(5, (801, 601, 401, 201, 1)), (TRAIN, TIMESTEPS)])
def test_an_interval_for_every_step_is_per_step(count: int, timesteps: tuple[int, ...]) -> None:
    context, spec = TimestepContext(timesteps), QuantSpec(8)
    t = torch.tensor(timesteps).repeat(2)
    x, quantized = random(len(t), 4), []
    for source in (
        EMARange(TimestepGroupConfig(count, TRAIN), spec, context),
        EMARange(PerStepConfig(), spec, context),
    ):
        with context.at(t):
            source.observe(x)
            quantized.append(fake_quantize(x, source(x), spec))
    assert torch.equal(*quantized)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_counts_are_named(count: int) -> None:
    with pytest.raises(ValueError, match=f"TimestepGroupConfig.count must be .*, got {count}"):
        TimestepGroupConfig(count, TRAIN)
