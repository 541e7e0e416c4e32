"""Simulated quantization while learning: the value of the plain path, and gradients element by element."""

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.functional import dequantize, fake_quantize, quantize
from tfmq_exp.quant.spec import QParams, QuantSpec, Scheme

SPECS = [
    QuantSpec(bits, scheme, axis)
    for bits in (2, 4, 8)
    for scheme in ("affine", "symmetric", "unsigned")
    for axis in (None, 0)
]
ROWS, COLUMNS = 3, 40


def setting(spec: QuantSpec, dtype: torch.dtype = torch.float64) -> tuple[Tensor, QParams]:
    """Values inside the grid, exactly at both of its ends, a little beyond them, and far outside."""
    shape = (1, 1) if spec.axis is None else (ROWS, 1)
    scale = torch.tensor([0.25, 0.5, 0.03])[: shape[0]].reshape(shape).to(dtype)
    zero_point = torch.tensor([1.0, 2.0, 3.0])[: shape[0]].reshape(shape).to(dtype) * (spec.scheme == "affine")
    generator = torch.Generator().manual_seed(0)
    codes = spec.qmin - 2 + (spec.levels + 3) * torch.rand(ROWS, COLUMNS, generator=generator, dtype=dtype)
    codes[:, :8] = torch.tensor(
        [spec.qmin, spec.qmax, spec.qmin - 0.4, spec.qmax + 0.4, spec.qmin - 0.6, spec.qmax + 0.6, -900, 900]
    )
    return scale * (codes - zero_point), QParams(scale, zero_point)


def oracle(x: float, scale: float, zero_point: float, spec: QuantSpec) -> tuple[float, float, float]:
    """Value, gradient to x, gradient to the scale."""
    code = round(x / scale) + zero_point
    if spec.qmin <= code <= spec.qmax:
        return scale * (code - zero_point), 1.0, round(x / scale) - x / scale
    end = spec.qmin if code < spec.qmin else spec.qmax
    return scale * (end - zero_point), 0.0, end - zero_point


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_gradients_are_those_of_the_formula_element_by_element(spec: QuantSpec) -> None:
    x, q = setting(spec)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    x.requires_grad_()
    q.scale.requires_grad_()
    value = fake_quantize(x, q, spec)
    value.backward(upstream)
    to_scale = [0.0] * len(q.scale)
    inside = 0
    for i in range(ROWS):
        entry = 0 if spec.axis is None else i
        scale, zero_point = q.scale[entry].item(), q.zero_point[entry].item()
        for j in range(COLUMNS):
            wanted, to_x, slope = oracle(x[i, j].item(), scale, zero_point, spec)
            assert value[i, j].item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
            assert x.grad[i, j].item() == to_x * upstream[i, j].item()  # type: ignore[index]
            to_scale[entry] += slope * upstream[i, j].item()
            inside += int(to_x)
    assert q.scale.grad.flatten().tolist() == pytest.approx(to_scale, rel=1e-9, abs=1e-9)  # type: ignore[union-attr]
    assert 4 * ROWS <= inside <= ROWS * (COLUMNS - 4)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_codes_at_the_ends_of_the_grid_are_inside(spec: QuantSpec) -> None:
    x, q = setting(spec)
    x.requires_grad_()
    fake_quantize(x, q, spec).sum().backward()
    assert x.grad[:, :8].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * ROWS  # type: ignore[index]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learned", [("x",), ("scale",), ("x", "scale")])
def test_value_is_that_of_the_path_without_gradients(
    spec: QuantSpec, dtype: torch.dtype, learned: tuple[str, ...]
) -> None:
    x, q = setting(spec, dtype)
    expected, before = fake_quantize(x, q, spec), x.clone()
    x.requires_grad_("x" in learned)
    q.scale.requires_grad_("scale" in learned)
    with_graph = fake_quantize(x, q, spec)
    assert with_graph.requires_grad
    assert not expected.requires_grad
    assert torch.equal(with_graph, expected)
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, q, spec), expected)
    assert torch.equal(x, before)
    assert torch.equal(dequantize(quantize(before, q, spec), q), expected)


@pytest.mark.parametrize("learned", ["x", "scale"])
def test_what_does_not_learn_gets_no_gradient(learned: str) -> None:
    x, q = setting(QuantSpec(4))
    x.requires_grad_(learned == "x")
    q.scale.requires_grad_(learned == "scale")
    fake_quantize(x, q, QuantSpec(4)).sum().backward()
    assert (x.grad is not None, q.scale.grad is not None) == (learned == "x", learned == "scale")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4, 1, 1), (4, 3, 1), (4, 3, 5)])
def test_gradient_has_the_shape_of_the_scale(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = torch.full(x.shape, 0.3, dtype=torch.float64, requires_grad=True)
    fake_quantize(x, QParams(whole, torch.full_like(whole, 8)), QuantSpec(4)).sum().backward()
    scale = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    fake_quantize(x, QParams(scale, torch.tensor(8.0)), QuantSpec(4)).sum().backward()
    torch.testing.assert_close(scale.grad, whole.grad.sum_to_size(shape))  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_inside_the_grid_it_is_autograd_of_the_straight_through_formula(scheme: Scheme) -> None:
    spec = QuantSpec(8, scheme)
    x = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for formula in (False, True):
        scale = torch.tensor([0.013], dtype=torch.float64, requires_grad=True)
        q = QParams(scale, torch.tensor([3.0], dtype=torch.float64) * (scheme == "affine"))
        y = dequantize(quantize(x, q, spec), q) if formula else fake_quantize(x, q, spec)
        y.square().sum().backward()
        results.append(scale.grad)
    torch.testing.assert_close(*results)
