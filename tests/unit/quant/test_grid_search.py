"""Searches over candidate ranges against trying them row by row."""

import numpy as np
import pytest
import torch

from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.grids.groups import group_range
from tfmq_exp.quant.grids.search import least_error, percentile_ranges, shrunken_ranges
from tfmq_exp.quant.spec import QParams, QuantSpec


def rows(count: int, values: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, values, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_every_row_gets_its_best_candidate(p: float, scheme: str) -> None:
    x, spec = rows(7, 40), QuantSpec(3, scheme)  # type: ignore[arg-type]
    ranges = list(shrunken_ranges(*group_range(x), count=60, shrink=0.015))
    found = least_error(x, (qparams_from_range(*each, spec) for each in ranges), spec, p)
    picked = set()
    for i, row in enumerate(x):
        errors = []
        for lo, hi in ranges:
            q = qparams_from_range(lo[i], hi[i], spec)
            errors.append(float(((fake_quantize(row, q, spec) - row).abs().double() ** p).mean()))
        best = int(np.argmin(errors))
        picked.add(best)
        assert found.scale[i].equal(qparams_from_range(ranges[best][0][i], ranges[best][1][i], spec).scale)
    assert len(picked) > 2


def test_of_equal_candidates_the_first_counts() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0]])
    first, second = (QParams(torch.tensor([[scale]]), torch.zeros(1, 1)) for scale in (1.0, 0.5))
    assert least_error(x, [first, second], QuantSpec(3)).scale.item() == 1
    assert least_error(x, [second, first], QuantSpec(3)).scale.item() == 0.5


def test_shrunken_ranges_begin_with_the_whole_one() -> None:
    found = [(float(lo), float(hi)) for lo, hi in shrunken_ranges(torch.tensor(-2.0), torch.tensor(4.0), 3, 0.25)]
    assert found == [(-2.0, 4.0), (-1.5, 3.0), (-1.0, 2.0)]
    assert len(list(shrunken_ranges(torch.zeros(1), torch.ones(1)))) == 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 31, 5000])
def test_percentile_ranges_are_numpy_s(count: int, dtype: torch.dtype) -> None:
    x = rows(20, count, seed=count).to(dtype)
    shares = (0.7, 0.999, 1.0)
    exact = x.double().numpy()
    for (lo, hi), share in zip(percentile_ranges(x, shares), shares, strict=True):
        for found, at in ((lo, 1 - share), (hi, share)):
            expected = np.quantile(exact, at, axis=-1, keepdims=True)
            # a share in float32 is off by up to 6e-8, which moves its place among many values
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_percentiles_leave_outliers_outside_and_may_start_at_zero() -> None:
    x = torch.cat([torch.linspace(-1, 2, 99_999), torch.tensor([1e4])])[None]
    ranges = list(percentile_ranges(x))
    assert [float(hi) for _, hi in ranges[:2]] == pytest.approx([2.0, 2.0], abs=0.01)
    assert all(float(lo) == pytest.approx(-1, abs=0.01) for lo, _ in ranges)
    assert all(float(lo) == 0 for lo, _ in percentile_ranges(x, from_zero=True))
    candidates = (qparams_from_range(*each, QuantSpec(8)) for each in percentile_ranges(x, (0.999, 1.0)))
    assert least_error(x, candidates, QuantSpec(8)).scale.item() == pytest.approx(1e4 / 255, rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.2, 1.1, float("nan")])
def test_shares_that_are_no_upper_ends_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="shares must be above"):
        list(percentile_ranges(torch.zeros(1, 4), (share,)))


def test_a_search_without_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        least_error(torch.zeros(1, 4), [], QuantSpec(4))
