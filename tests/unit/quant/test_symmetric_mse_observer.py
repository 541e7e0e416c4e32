"""PTQ4DM's thresholds against a loop over channels and candidates."""

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.observers import MinMax, SymmetricMSEObserver
from tfmq_exp.quant.spec import QuantSpec, Scheme

SCHEMES: list[Scheme] = ["affine", "symmetric"]


def weight(seed: int = 0) -> Tensor:
    """Channels of very different sizes: one positive, one negative, one with an outlier, one of zeros."""
    w = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, 6)[:, None, None]
    w[1], w[2], w[5] = w[1].abs() + 0.1, -w[2].abs(), 0
    w[3, 0, 0] = 400.0
    return w


def candidates(channel: Tensor, count: int) -> list[tuple[float, float]]:
    """Every range that is tried."""
    lo, hi = float(channel.min()), float(channel.max())
    largest = max(abs(lo), abs(hi))
    thresholds = [largest * i / count for i in range(1, count + 1)]
    return [(-threshold if lo < 0 else 0.0, threshold if hi > 0 else 0.0) for threshold in thresholds]


def loss(channel: Tensor, lo: float, hi: float, spec: QuantSpec) -> float:
    row_spec = QuantSpec(spec.bits, spec.scheme)
    ends = (torch.tensor(end, dtype=torch.float64) for end in (lo, hi))
    y = fake_quantize(channel, qparams_from_range(*ends, row_spec), row_spec)
    return float((y - channel).double().abs().pow(2.4).mean())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [100, 7])
def test_equals_a_loop_over_channels_and_thresholds(bits: int, scheme: Scheme, count: int) -> None:
    w, spec = weight(), QuantSpec(bits, scheme, axis=0)
    lo, hi = SymmetricMSEObserver(candidates=count)(w, spec)
    assert lo.shape == hi.shape == (6, 1, 1)
    for channel, low, high in zip(w, lo.flatten().tolist(), hi.flatten().tolist(), strict=True):
        tried = candidates(channel, count)
        assert any((low, high) == pytest.approx(ends, rel=1e-12) for ends in tried)
        best = min(loss(channel, *ends, spec) for ends in tried)
        assert loss(channel, low, high, spec) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_tensors_by_hand(sign: int) -> None:
    x, largest = sign * torch.tensor([0.0, 1.0, 2.0, 3.0, 3.2]), 3.2
    losses = []
    for i in range(1, 101):
        step = largest * i / 100 / 3  # four levels, the first of them zero
        grid = [level * step for level in range(4)]
        nearest = [min(grid, key=lambda point, value=value: abs(point - value)) for value in (0, 1, 2, 3, 3.2)]
        losses.append(sum(abs(a - b) ** 2.4 for a, b in zip(nearest, (0, 1, 2, 3, 3.2), strict=True)))
    threshold = largest * (losses.index(min(losses)) + 1) / 100
    lo, hi = (float(end) for end in SymmetricMSEObserver()(x, QuantSpec(2)))
    assert (lo, hi) == pytest.approx((0, threshold) if sign > 0 else (-threshold, 0), abs=1e-6)
    assert threshold < largest


def test_whole_tensors_have_one_threshold() -> None:
    w = weight()
    lo, hi = SymmetricMSEObserver()(w, QuantSpec(4))
    best = min(loss(w, *ends, QuantSpec(4)) for ends in candidates(w, 100))
    assert float(lo) == -float(hi)
    assert loss(w, float(lo), float(hi), QuantSpec(4)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_memory_budget_does_not_change_the_thresholds(scheme: Scheme) -> None:
    w, spec = weight(), QuantSpec(4, scheme, axis=0)
    for memory in (1, 4 * 4 * w.numel() * 30):
        for whole, chunked in zip(
            SymmetricMSEObserver()(w, spec), SymmetricMSEObserver(memory=memory)(w, spec), strict=True
        ):
            assert torch.equal(whole, chunked)


def test_symmetric_thresholds_never_lose_to_the_whole_range() -> None:
    w, spec = weight(), QuantSpec(3, "symmetric", axis=0)
    searched, whole = (
        (fake_quantize(w, qparams_from_range(*find(w, spec), spec), spec) - w).abs().pow(2.4).flatten(1).mean(dim=1)
        for find in (SymmetricMSEObserver(), MinMax())
    )
    assert bool((searched <= whole * (1 + 1e-6)).all())
    assert bool((searched < 0.9 * whole).any())


def test_zeros_stay_zero() -> None:
    x, spec = torch.zeros(2, 8), QuantSpec(8, axis=0)
    q = qparams_from_range(*SymmetricMSEObserver()(x, spec), spec)
    assert torch.equal(fake_quantize(x, q, spec), x)


@pytest.mark.parametrize("most", [50, 250])
def test_fewer_values_are_evenly_spaced_ones(most: int) -> None:
    x, spec = torch.randn(1000, generator=torch.Generator().manual_seed(3)), QuantSpec(4)
    x[0] = 6.0  # the largest magnitude stays among the values
    kept = x[:: 1000 // most]
    found = SymmetricMSEObserver(max_values=most)(x, spec)
    assert torch.equal(torch.stack(found), torch.stack(SymmetricMSEObserver()(kept, spec)))
    assert not torch.equal(torch.stack(found), torch.stack(SymmetricMSEObserver()(x, spec)))
    everything = SymmetricMSEObserver(max_values=1000)(x, spec)
    assert torch.equal(torch.stack(everything), torch.stack(SymmetricMSEObserver()(x, spec)))
