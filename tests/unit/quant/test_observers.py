"""Observers against one loop per channel and candidate."""

import math

import numpy as np
import pytest
import torch

from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.histogram_observers import EntropyObserver, HistogramPercentileObserver, bin_counts, bin_edges
from tfmq_exp.quant.observers import LpObserver, MinMax
from tfmq_exp.quant.spec import QuantSpec

ALL = [
    MinMax(),
    LpObserver(),
    LpObserver(include_zero=False),
    EntropyObserver(),
    HistogramPercentileObserver(),
    HistogramPercentileObserver(positive_only=True),
]


def weight(seed: int = 0) -> torch.Tensor:
    """Channels of very different sizes, one of a single sign and one with an outlier."""
    w = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, 5)[:, None, None]
    w[1] = w[1].abs() + 0.1
    w[2, 0, 0] = 40.0
    return w


@pytest.mark.parametrize("observer", ALL, ids=repr)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_all_channels_at_once_equal_one_after_another(observer, axis):
    w = weight()
    lo, hi = observer(w, QuantSpec(4, axis=axis))
    assert lo.shape == hi.shape == QuantSpec(4, axis=axis).range_shape(w.shape)
    for i, channel in enumerate(w.unbind(axis)):
        one_lo, one_hi = observer(channel, QuantSpec(4))
        assert one_lo.item() == lo.flatten()[i].item()
        assert one_hi.item() == hi.flatten()[i].item()


@pytest.mark.parametrize("observer", ALL, ids=repr)
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8), torch.full((3, 8), 2.5), -weight().abs()], ids=["zero", "equal", "negative"]
)
def test_extreme_tensors_give_usable_grids(observer, scheme, x):
    spec = QuantSpec(8, scheme, axis=0)
    q = qparams_from_range(*observer(x, spec), spec)
    assert bool((q.scale > 0).all())
    error = (fake_quantize(x, q, spec) - x).flatten(1).norm(dim=1)
    assert bool((error <= 0.3 * x.flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("with_zero", [True, False])
def test_lp_search_equals_a_loop_over_candidates(bits, scheme, with_zero):
    w, spec = weight(3), QuantSpec(bits, scheme, axis=0)
    lo, hi = LpObserver(include_zero=with_zero)(w, spec)
    for i, channel in enumerate(w):
        least, greatest = channel.min().double(), channel.max().double()
        if with_zero:
            least, greatest = least.clamp(max=0), greatest.clamp(min=0)
        best = (math.inf, None, None)
        for candidate in range(80):
            factor = 1 - 0.01 * candidate
            grid = QuantSpec(bits, scheme)
            y = fake_quantize(channel, qparams_from_range(least * factor, greatest * factor, grid), grid)
            loss = float((y - channel).abs().pow(2.4).mean())
            if loss < best[0]:
                best = (loss, least * factor, greatest * factor)
        assert lo[i].item() == pytest.approx(float(best[1]), rel=1e-12)
        assert hi[i].item() == pytest.approx(float(best[2]), rel=1e-12)


@pytest.mark.parametrize("make", [LpObserver, EntropyObserver])
def test_the_memory_budget_does_not_change_the_result(make):
    w, spec = weight(), QuantSpec(4, axis=0)
    for whole, chunked in zip(make()(w, spec), make(memory=1)(w, spec), strict=True):
        assert torch.equal(whole, chunked)


def test_the_search_never_loses_to_min_max():
    w, spec = weight(), QuantSpec(3, axis=0)

    def loss(observer):
        y = fake_quantize(w, qparams_from_range(*observer(w, spec), spec), spec)
        return (y - w).abs().pow(2.4).flatten(1).mean(dim=1)

    assert bool((loss(LpObserver()) <= loss(MinMax())).all())
    assert bool((loss(LpObserver()) < loss(MinMax())).any())


def test_widening_keeps_the_zero_point_inside_the_grid():
    x, spec = torch.linspace(5, 6, 50), QuantSpec(4)
    inside = qparams_from_range(*LpObserver()(x, spec), spec).zero_point
    outside = qparams_from_range(*LpObserver(include_zero=False)(x, spec), spec).zero_point
    assert spec.qmin <= inside <= spec.qmax
    assert outside < spec.qmin


@pytest.mark.parametrize("bins", [4, 16, 256])
def test_bins_are_those_of_numpy(bins):
    x = torch.randn(200, generator=torch.Generator().manual_seed(1))
    edges = bin_edges(x.min(), x.max(), bins)
    counts, numpy_edges = np.histogram(x.numpy(), bins=bins)
    assert np.array_equal(edges.numpy(), numpy_edges)
    assert np.array_equal(bin_counts(x, edges).numpy(), counts)
    narrow = bin_edges(torch.tensor(-0.5), torch.tensor(1.0), bins)
    assert np.array_equal(
        bin_counts(x, narrow).numpy(), np.histogram(x.numpy(), bins, range=(np.float32(-0.5), np.float32(1)))[0]
    )


@pytest.mark.parametrize("levels", [4, 16, 64])
def test_kl_equals_a_walk_over_the_bins(levels):
    x = weight(5).flatten()[:36].clamp(-3, 5)
    lo, hi = x.min().double(), x.max().double()
    p, edges = np.histogram(x.numpy(), bins=levels, density=True)
    expected = []
    for factor in np.linspace(0.5, 1.0, 50):
        t, t_edges = np.histogram(x.double().clamp(lo * factor, hi * factor).numpy(), bins=levels, density=True)
        at, value, total = 0, 0.0, 0.0
        for k in range(levels):
            if at <= levels and t_edges[at] <= edges[k]:
                value = t[at] if at < levels else 0.0
                at += 1
            total += (p[k] + 1e-5) * math.log((p[k] + 1e-5) / (value + 1e-5))
        expected.append(total)
    ours = EntropyObserver().divergences(x[None], torch.from_numpy(np.linspace(0.5, 1.0, 50)), levels)
    np.testing.assert_allclose(ours[0].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_histogram_clips_what_exceeds_the_mass():
    x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([100.0])])
    spec = QuantSpec(8)
    assert [float(end) for end in HistogramPercentileObserver()(x, spec)] == [-1.0, pytest.approx(100 * 255.5 / 256)]
    lo, hi = HistogramPercentileObserver(mass=0.99)(x, spec)
    assert float(lo) == pytest.approx(-100 * 2.5 / 256)
    assert float(hi) == pytest.approx(100 * 2.5 / 256)
