import pytest
import torch

from tfmq_exp.quant.functional import SMALLEST_SCALE, dequantize, fake_quantize, qparams_from_range, quantize, round_ste
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QParams, QuantSpec

SCHEMES = ["affine", "symmetric", "unsigned"]


def sample(scheme: str) -> torch.Tensor:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]
    return x.abs() if scheme == "unsigned" else x


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_grid_properties(scheme, bits, axis):
    x, spec = sample(scheme), QuantSpec(bits, scheme, axis)
    q = qparams_from_range(*MinMax()(x, spec), spec)
    assert q.scale.shape == q.zero_point.shape == spec.range_shape(x.shape)
    codes, y = quantize(x, q, spec), fake_quantize(x, q, spec)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= spec.qmin
    assert codes.max() <= spec.qmax
    assert torch.equal(fake_quantize(y, q, spec), y)
    assert bool(((y - x).abs() <= q.scale * 0.5 + 1e-6 * x.abs()).all())
    assert torch.equal(fake_quantize(torch.zeros_like(x), q, spec), torch.zeros_like(x))


def test_affine_range_is_covered_end_to_end():
    spec = QuantSpec(4)
    lo, hi = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([3.0, 0.0, 5.0])
    q = qparams_from_range(lo, hi, spec)
    torch.testing.assert_close(q.scale, (hi - lo) / 15)
    assert bool(((q.zero_point >= spec.qmin) & (q.zero_point <= spec.qmax)).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_outside_the_range_go_to_its_ends(scheme):
    spec = QuantSpec(4, scheme)
    q = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), spec)
    ends = fake_quantize(torch.tensor([-100.0, 100.0]), q, spec)
    assert torch.equal(ends, dequantize(torch.tensor([spec.qmin, spec.qmax], dtype=torch.float32), q))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_zero_tensors_stay_zero(scheme):
    x, spec = torch.zeros(3, 4), QuantSpec(8, scheme, axis=0)
    q = qparams_from_range(*MinMax()(x, spec), spec)
    assert bool((q.scale == SMALLEST_SCALE).all())
    assert torch.equal(fake_quantize(x, q, spec), x)


def test_ties_round_to_even():
    q = QParams(torch.tensor(1.0), torch.tensor(8.0))
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert fake_quantize(x, q, QuantSpec(4)).tolist() == [-2, 0, 0, 2, 2]


def test_round_ste_passes_the_gradient_through():
    x = torch.tensor([0.2, 0.7, -1.4], requires_grad=True)
    y = round_ste(x)
    y.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert y.tolist() == [0, 1, -1]
    assert x.grad.tolist() == [1, 2, 3]


def test_gradient_stops_where_values_are_clamped():
    x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    spec = QuantSpec(4)
    fake_quantize(x, qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), spec), spec).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("bits", [0, 1, 17, -4, 4.5, "8", None])
def test_impossible_bits_raise(bits):
    with pytest.raises(ValueError, match="bits"):
        QuantSpec(bits)


def test_unknown_scheme_raises():
    with pytest.raises(ValueError, match="scheme"):
        QuantSpec(8, "binary")
