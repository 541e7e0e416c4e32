"""Shifted activations: a layer's output stays, and unsigned integers serve what GELU gives."""

import pytest
import torch
from torch.nn.functional import conv2d, gelu, linear, pad

from tfmq_exp.quant.grids.groups import quantize_groups
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.transforms.shift import GELU_SHIFT, quantize_shifted, shifted_bias


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_shifted_input_with_its_bias_has_the_layer_s_output(with_bias: bool) -> None:
    x, weight, bias = normal(3, 8), normal(5, 8, seed=1), normal(5, seed=2) if with_bias else None
    torch.testing.assert_close(linear(x + 0.25, weight, shifted_bias(weight, bias, 0.25)), linear(x, weight, bias))


def test_a_convolution_pads_before_the_shift() -> None:
    x, weight, bias = pad(normal(2, 3, 6, 6), (1, 1, 1, 1)), normal(4, 3, 3, 3, seed=1), normal(4, seed=2)
    torch.testing.assert_close(conv2d(x + GELU_SHIFT, weight, shifted_bias(weight, bias)), conv2d(x, weight, bias))


def test_the_shift_lies_just_above_what_gelu_can_give() -> None:
    for approximate in ("none", "tanh"):
        smallest = float(gelu(torch.linspace(-3, 0, 100_001), approximate=approximate).min())
        assert 0 < smallest + GELU_SHIFT < 0.002


def test_shifted_values_use_all_unsigned_integers_of_every_group() -> None:
    x = gelu(normal(6, 16))
    found = quantize_shifted(x, 4, 8)
    for row in range(6):
        for start in (0, 8):
            group = [float(v) + GELU_SHIFT for v in x[row, start : start + 8]]
            scale = max(group) / 15
            expected = [round(v / scale) * scale for v in group]
            assert found[row, start : start + 8].tolist() == pytest.approx(expected, abs=1e-6)
    error = (found - GELU_SHIFT - x).square().mean()
    assert error < 0.5 * (quantize_groups(x, QuantSpec(4, "symmetric"), 8) - x).square().mean()


def test_values_below_the_shift_are_clipped() -> None:
    assert quantize_shifted(torch.tensor([[-1.0, 1.0 - GELU_SHIFT]]), 4, None).tolist() == [[0.0, 1.0]]
