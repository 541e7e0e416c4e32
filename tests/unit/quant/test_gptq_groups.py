"""GPTQ with ranges of groups of columns against the definition, column after column."""

import pytest
import torch
from torch import Tensor

from tests.unit.quant.test_gptq import problem
from tfmq_exp.quant.functional import dequantize, qparams_from_range, quantize
from tfmq_exp.quant.gptq import ColumnGroups, gptq, gptq_in_groups, without_dead_inputs
from tfmq_exp.quant.grids.groups import group_range
from tfmq_exp.quant.spec import QParams, QuantSpec


def placed(spec: QuantSpec):
    return lambda values: qparams_from_range(*group_range(values), spec)


def one_by_one(weight: Tensor, moments: Tensor, spec: QuantSpec, size: int, block: int | None) -> Tensor:
    """Dequantized weight: ranges from current values, with a block from those before the block in which a group begins."""
    w, out = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    h = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    for j in range(weight.shape[1]):
        if not block or j % block == 0:
            seen = w.clone()
        if j % size == 0:
            scale, zero_point = placed(spec)(seen[:, j : j + size])
        code = (torch.round(w[:, j] / scale[:, 0]) + zero_point[:, 0]).clamp(spec.qmin, spec.qmax)
        out[:, j] = (code - zero_point[:, 0]) * scale[:, 0]
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - out[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize(("bits", "scheme"), [(3, "affine"), (4, "symmetric")])
@pytest.mark.parametrize("size", [4, 6, 7, 24])
@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize("before_block", [False, True])
def test_values_are_those_of_one_column_after_the_other(
    bits: int, scheme: str, size: int, block: int, before_block: bool
) -> None:
    weight, x, _, spec = problem(1, 5, 24, bits, scheme, seed=bits)
    moments = (x.transpose(1, 2) @ x).double()
    groups = ColumnGroups(size, placed(spec), before_block)
    codes, q = gptq_in_groups(weight, moments, groups, spec, block=block)
    slow = one_by_one(weight[0], moments[0], spec, size, block if before_block else None)
    torch.testing.assert_close(dequantize(codes, q)[0].double(), slow, rtol=0, atol=1e-5)
    assert q.scale.shape == weight.shape
    assert all(part[0, 0, :size].unique().numel() == 1 for part in q)


def test_several_matrices_are_treated_as_each_alone() -> None:
    weight, x, _, spec = problem(3, 6, 20, 4, "affine", seed=1)
    moments, groups = (x.transpose(1, 2) @ x).double(), ColumnGroups(8, placed(spec))
    codes, q = gptq_in_groups(weight, moments, groups, spec)
    for i in range(3):
        alone, own = gptq_in_groups(weight[i : i + 1], moments[i : i + 1], groups, spec)
        assert codes[i].equal(alone[0])
        assert q.scale[i].equal(own.scale[0])


def test_ranges_after_earlier_errors_beat_rounding_to_nearest_in_groups() -> None:
    weight, x, _, spec = problem(2, 16, 64, 3, "affine", seed=2)
    codes, q = gptq_in_groups(weight, x.transpose(1, 2) @ x, ColumnGroups(16, placed(spec)), spec, block=24)
    parts = [placed(spec)(part) for part in weight.split(16, dim=2)]
    fixed = QParams(
        *(torch.cat([part.expand(2, 16, 16) for part in column], dim=2) for column in zip(*parts, strict=True))
    )

    def error(values: Tensor) -> float:
        return float(((weight - values) @ x.transpose(1, 2)).square().sum())

    nearest = error(dequantize(quantize(weight, fixed, spec), fixed))
    assert error(dequantize(codes, q)) < 0.6 * nearest
    # ranges that are fixed before leave the order of columns free
    assert error(dequantize(gptq(weight, x.transpose(1, 2) @ x, fixed, spec), fixed)) < 0.6 * nearest


def test_dead_inputs_of_released_programs() -> None:
    weight, x, _, _ = problem(1, 4, 8, 4, "affine", seed=3)
    x[:, :, 5] = 0
    moments = x.transpose(1, 2) @ x
    alive, damped = without_dead_inputs(weight, moments)
    assert (alive[0, :, 5] == 0).all()
    assert damped[0, 5, 5] == 1
    others = [0, 1, 2, 3, 4, 6, 7]
    assert alive[0][:, others].equal(weight[0][:, others])
    assert damped[0][others][:, others].equal(moments[0][others][:, others])
    assert moments[0, 5, 5] == 0
    assert (weight[0, :, 5] != 0).all()


def test_groups_without_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 column, got 0"):
        ColumnGroups(0, placed(QuantSpec(4)))
