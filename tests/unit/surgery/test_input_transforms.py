"""Shifts of inputs and branches of low rank leave a layer's function as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.surgery.input_transforms import shift_input
from tfmq_exp.surgery.low_rank import add_branch


def layer(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 10, bias=bias, dtype=torch.float64)).requires_grad_(False)


def activations() -> torch.Tensor:
    return 3 * torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "number"), [(F.gelu, 0.171875), (F.silu, 0.2785)])
def test_shift_makes_activations_positive_and_changes_no_output(activation: object, number: float, bias: bool) -> None:
    network = layer(bias)
    x = activation(activations())  # type: ignore[operator]
    before = network(x)
    shift_input(network, "0", number)
    read: list[torch.Tensor] = []
    network.get_submodule("0.layer").register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    assert (network(x) - before).abs().max() <= 1e-13
    assert x.min() < 0 <= read[0].min()
    torch.testing.assert_close(read[0], x + number, rtol=0, atol=0)


def test_a_shift_of_zero_changes_no_bit() -> None:
    network, x = layer(), activations()
    before = network(x)
    shift_input(network, "0", 0.0)
    assert torch.equal(network(x), before)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_infinite_shifts_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match=f"inputs of 0 can be shifted by a finite number, not by {number}"):
        shift_input(layer(), "0", number)


def factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the best approximation of this rank."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


def coarse(weight: torch.Tensor) -> torch.Tensor:
    """The weight in two bits with one range."""
    qparams = qparams_from_range(weight.min(), weight.max(), QuantSpec(2))
    return fake_quantize(weight, qparams, QuantSpec(2))


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_a_branch_changes_no_output(rank: int) -> None:
    network, x = layer(), activations()
    before = network(x)
    add_branch(network, "0", *factors(network.get_parameter("0.weight"), rank))
    assert (network(x) - before).abs().max() <= 1e-13


def test_a_branch_of_full_rank_gives_the_float_layer_whatever_the_residual_s_bits() -> None:
    errors = []
    for rank in (0, 4, 10):
        network, x = layer(), activations()
        before = network(x)
        add_branch(network, "0", *factors(network.get_parameter("0.weight"), rank))
        residual = network.get_parameter("0.layer.weight")
        residual.copy_(coarse(residual))
        errors.append((network(x) - before).abs().max().item())
    assert min(errors[:2]) > 0.1
    assert errors[2] <= 1e-12


def test_factors_of_other_shapes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"factors of 0 must be \[rank, 24\] and \[10, rank\], got \[3, 10\] and \[24, 3\]"
    ):
        add_branch(layer(), "0", torch.ones(3, 10), torch.ones(24, 3))
