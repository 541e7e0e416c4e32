import pytest
import torch

from tfmq_exp.quant.functional import dequantize, qparams_from_range, quantize
from tfmq_exp.quant.gptq import gptq
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QParams, QuantSpec


def problem(groups: int, rows: int, columns: int, bits: int, scheme: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator) / columns**0.5
    x = torch.randn(groups, 4 * columns, columns, generator=generator) @ mix
    weight = torch.randn(groups, rows, columns, generator=generator)
    spec = QuantSpec(bits, scheme, axis=0)
    flat = weight.flatten(0, 1)
    qparams = QParams(*(part.view(groups, rows, 1) for part in qparams_from_range(*MinMax()(flat, spec), spec)))
    return weight, x, qparams, spec


def one_by_one(weight, moments, qparams, spec, damping):
    """GPTQ as optimal brain quantization defines it: after each column, the best change of all columns that are left.

    Columns in their order, no blocks, no factors: the inverse of what is left is computed anew.
    """
    w, codes = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    h = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(len(moments))
    scale, zero_point = (part.double() for part in qparams)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        codes[:, j] = (torch.round(w[:, j] / scale[:, 0]) + zero_point[:, 0]).clamp(spec.qmin, spec.qmax)
        error = (w[:, j] - (codes[:, j] - zero_point[:, 0]) * scale[:, 0]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize(("bits", "scheme"), [(4, "affine"), (3, "affine"), (8, "symmetric"), (2, "affine")])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_codes_are_those_of_one_column_after_the_other(bits: int, scheme: str, block: int) -> None:
    weight, x, qparams, spec = problem(1, 6, 17, bits, scheme, seed=bits)
    moments = (x.transpose(1, 2) @ x).double()
    found = gptq(weight, moments, qparams, spec, activation_order=False, block=block)
    slow = one_by_one(weight[0], moments[0], QParams(*(part[0] for part in qparams)), spec, 0.01)
    assert (found[0].double() == slow).all()


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_error_is_less_than_that_of_rounding_to_nearest(bits: int, activation_order: bool) -> None:
    weight, x, qparams, spec = problem(3, 16, 64, bits, "affine", seed=1)
    codes = gptq(weight, x.transpose(1, 2) @ x, qparams, spec, activation_order=activation_order, block=16)
    assert spec.qmin <= int(codes.min())
    assert int(codes.max()) <= spec.qmax
    assert (codes == codes.round()).all()

    def error(integers: torch.Tensor) -> torch.Tensor:
        return ((weight - dequantize(integers, qparams)) @ x.transpose(1, 2)).square().sum(dim=(1, 2))

    assert (error(codes) < 0.7 * error(quantize(weight, qparams, spec))).all()


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight, _, qparams, spec = problem(2, 5, 12, 3, "affine", seed=2)
    moments = torch.diag_embed(torch.rand(2, 12) + 0.1)
    for order in (False, True):
        found = gptq(weight, moments, qparams, spec, activation_order=order, block=4)
        assert (found == quantize(weight, qparams, spec)).all()


def test_inputs_that_are_always_zero_change_nothing_else() -> None:
    weight, x, qparams, spec = problem(1, 8, 20, 4, "affine", seed=3)
    x[:, :, [4, 11]] = 0
    found = gptq(weight, x.transpose(1, 2) @ x, qparams, spec)
    assert (found[:, :, [4, 11]] == quantize(weight, qparams, spec)[:, :, [4, 11]]).all()


def test_fewer_samples_than_inputs_and_float32_are_enough() -> None:
    weight, x, qparams, spec = problem(1, 8, 200, 4, "affine", seed=4)
    few = x[:, :30]
    moments = few.transpose(1, 2) @ few * 1e-8  # of rank 30, and small
    codes = gptq(weight, moments, qparams, spec)
    assert (codes == gptq(weight, moments.double() * 1e8, qparams, spec)).float().mean() > 0.99


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_refused(wrong: float) -> None:
    weight, x, qparams, spec = problem(1, 4, 8, 4, "affine", seed=5)
    moments = x.transpose(1, 2) @ x
    moments[0, 2, 2] = wrong
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(weight, moments, qparams, spec)
