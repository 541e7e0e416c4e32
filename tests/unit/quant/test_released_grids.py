"""Each difference of the released programs' grids, on numbers that show it."""

import pytest
import torch

from tfmq_exp.core.validate import WrongValueError
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.grids.released import ReleasedGrid
from tfmq_exp.quant.spec import QuantSpec


def ends(*pairs: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = torch.tensor(pairs).unbind(1)
    return lo[:, None], hi[:, None]


@pytest.mark.parametrize("scheme", ["affine", "symmetric", "unsigned"])
def test_without_options_it_is_the_usual_grid_but_for_rounding(scheme: str) -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    lo, hi = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    spec = QuantSpec(4, scheme)  # type: ignore[arg-type]
    ours, usual = ReleasedGrid()(lo, hi, spec), qparams_from_range(lo, hi, spec)
    torch.testing.assert_close(ours.scale, usual.scale, rtol=2e-7, atol=0)
    assert ours.zero_point.equal(usual.zero_point)


def test_scales_have_the_precision_of_the_range() -> None:
    lo, hi = (end.to(torch.bfloat16) for end in ends((-1.0, 0.7)))
    assert ReleasedGrid()(lo, hi, QuantSpec(4)).scale.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_range_of_one_value_gives_that_value_and_no_nan(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 1, dtype=dtype)
    for scheme in ("affine", "symmetric", "unsigned"):
        spec = QuantSpec(4, scheme)  # type: ignore[arg-type]
        assert fake_quantize(zero, ReleasedGrid()(zero, zero, spec), spec).item() == 0
    if dtype == torch.float32:
        one = torch.ones(1, 1)
        assert fake_quantize(one, ReleasedGrid()(one, one, QuantSpec(4)), QuantSpec(4)).isfinite().all()


def test_a_clamped_zero_point_clips_a_range_above_zero() -> None:
    spec, (lo, hi) = QuantSpec(2), ends((2.0, 5.0))
    x = torch.tensor([[2.0, 3.0, 4.0, 5.0]])
    assert fake_quantize(x, ReleasedGrid()(lo, hi, spec), spec).equal(x)  # zero point -2
    clipped = fake_quantize(x, ReleasedGrid(clamp_zero_point=True)(lo, hi, spec), spec)
    assert clipped.tolist() == [[2.0, 3.0, 3.0, 3.0]]


def test_the_smallest_range_and_the_smallest_scale() -> None:
    lo, hi = ends((0.0, 3e-6), (-1.0, 2.0))
    affine, symmetric = QuantSpec(2), QuantSpec(2, "symmetric")
    assert ReleasedGrid(smallest_range=1e-5)(lo, hi, affine).scale.flatten().tolist() == pytest.approx([1e-5 / 3, 1.0])
    assert ReleasedGrid(smallest_range=1e-5)(lo, hi, symmetric).scale.flatten().tolist() == pytest.approx([1e-5, 2.0])
    assert ReleasedGrid(smallest_scale=1e-2)(lo, hi, affine).scale.flatten().tolist() == pytest.approx([1e-2, 1.0])


def test_one_small_scale_takes_all_with_it() -> None:
    grid = ReleasedGrid(smallest_scale=1e-6, all_or_none=True)
    q = grid(*ends((0.0, 0.0), (-1.0, 2.0)), QuantSpec(2))
    assert q.scale.flatten().tolist() == pytest.approx([1e-6, 1e-6])
    assert q.zero_point.flatten().tolist() == [0.0, 1e6]
    assert grid(*ends((-1.0, 2.0)), QuantSpec(2)).scale.item() == 1


def test_all_levels_place_the_largest_value_half_a_step_outside() -> None:
    grid, spec = ReleasedGrid(all_levels=True), QuantSpec(2, "symmetric")
    lo, hi = ends((-3.0, 1.0), (0.0, 3.0), (0.0, 0.0))
    q = grid(lo, hi, spec)
    assert q.scale.flatten().tolist() == pytest.approx([2.0, 1.0, 2 / 3])
    x = torch.tensor([[-3.0, 3.0], [1.0, 3.0], [0.0, 0.0]])
    assert fake_quantize(x, q, spec).tolist() == [[-4.0, 2.0], [1.0, 1.0], [0.0, 0.0]]
    assert grid(*ends((0.0, 0.0)), QuantSpec(2)).scale.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("wrong", [{"smallest_range": -1.0}, {"smallest_scale": float("nan")}, {"all_levels": 1}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(WrongValueError, match=next(iter(wrong))):
        ReleasedGrid(**wrong)  # type: ignore[arg-type]
