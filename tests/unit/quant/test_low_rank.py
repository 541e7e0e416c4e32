"""Branches of low rank against numpy's singular values, the definition of their iterations, and what rank must give."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tfmq_exp.quant.grids.groups import quantize_groups
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.transforms.low_rank import (
    Branch,
    iterated_low_rank,
    low_rank,
    low_rank_linear,
    shared_low_rank,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(x: Tensor) -> Tensor:
    return quantize_groups(x, QuantSpec(3, "symmetric"), 8)


def output_error(x: Tensor, weight: Tensor) -> Callable[[Branch, Tensor], float]:
    return lambda branch, rest: float(
        (low_rank_linear(x, quantized(x), branch, rest) - linear(x, weight)).double().square().sum()
    )


@pytest.mark.parametrize("rank", [1, 3, 11])
def test_what_a_branch_leaves_are_the_smallest_singular_values(rank: int) -> None:
    """The nearest matrix of a rank is off by the singular values after it (Eckart and Young)."""
    weight = normal(12, 20)
    branch = low_rank(weight, rank)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert float((weight - branch.weight).norm()) == pytest.approx(float(np.sqrt((values[rank:] ** 2).sum())), rel=1e-5)
    assert np.linalg.matrix_rank(branch.weight.numpy(), tol=1e-4) == rank
    torch.testing.assert_close(branch.down @ branch.down.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_a_branch_of_full_rank_is_the_layer() -> None:
    weight, x, bias = normal(12, 16).double(), normal(3, 7, 16, seed=1).double(), normal(12, seed=2).double()
    branch = low_rank(weight, 12)
    out = low_rank_linear(x, quantized(x), branch, quantized(weight - branch.weight), bias)
    torch.testing.assert_close(out, linear(x, weight, bias), rtol=0, atol=1e-12 * 1e2)


def test_the_branch_reads_the_input_that_is_not_quantized() -> None:
    weight, x = normal(12, 16), normal(5, 16, seed=1)
    branch = low_rank(weight, 4)
    rest = weight - branch.weight
    expected = linear(quantized(x), rest) + linear(x, branch.weight)
    torch.testing.assert_close(low_rank_linear(x, quantized(x), branch, rest), expected, rtol=0, atol=1e-5)


def test_weights_with_one_input_share_a_factor_as_one_weight_would() -> None:
    weights = [normal(6, 16), normal(10, 16, seed=1), normal(4, 16, seed=2)]
    branches = shared_low_rank(weights, 3)
    assert [branch.up.shape for branch in branches] == [(6, 3), (10, 3), (4, 3)]
    assert all(branch.down is branches[0].down for branch in branches)
    u, s, vh = np.linalg.svd(torch.cat(weights).double().numpy())
    np.testing.assert_allclose(
        torch.cat([branch.weight for branch in branches]).numpy(), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5
    )


def test_iterations_are_those_of_the_definition() -> None:
    weight, x = normal(24, 32), normal(40, 32, seed=1)
    error = output_error(x, weight)
    found = iterated_low_rank(weight, 4, quantized, error, 30)
    errors: list[float] = []
    kept: list[Tensor] = []
    q = np.zeros((24, 32))
    while len(errors) < 2 or errors[-1] <= min(errors):
        u, s, vh = np.linalg.svd(weight.double().numpy() - q, full_matrices=False)
        product = torch.from_numpy((u[:, :4] * s[:4]) @ vh[:4]).float()
        rest = quantized(weight - product)
        errors.append(
            float((linear(quantized(x), rest) + linear(x, product) - linear(x, weight)).double().square().sum())
        )
        kept.append(product)
        q = rest.double().numpy()
    assert 2 < len(errors) < 30
    assert found.errors == pytest.approx(errors, rel=1e-3)
    torch.testing.assert_close(found.branch.weight, kept[-2], rtol=0, atol=1e-3)
    assert error(found.branch, found.quantized) == min(found.errors) == found.errors[-2]


def test_one_iteration_is_the_decomposition_alone_and_more_are_not_worse() -> None:
    weight, x = normal(24, 32), normal(40, 32, seed=1)
    error = output_error(x, weight)
    once, often = (iterated_low_rank(weight, 4, quantized, error, count) for count in (1, 30))
    assert once.branch.weight.equal(low_rank(weight, 4).weight)
    assert len(once.errors) == 1
    assert min(often.errors) < once.errors[0] == often.errors[0]
    nothing = Branch(torch.zeros(1, 32), torch.zeros(24, 1))
    assert once.errors[0] < error(nothing, quantized(weight))


def test_of_equal_errors_the_later_counts_and_no_more_than_asked_are_made() -> None:
    found = iterated_low_rank(normal(8, 8), 2, quantized, lambda branch, rest: 1.0, 4)
    assert found.errors == [1.0] * 4
    second = iterated_low_rank(normal(8, 8), 2, quantized, lambda branch, rest: 1.0, 1)
    assert not found.branch.weight.equal(second.branch.weight)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_no_weight_has_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"from 1 to 8 .*got {rank}"):
        low_rank(normal(8, 12), rank)


def test_no_iterations_and_errors_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        iterated_low_rank(normal(8, 8), 2, quantized, lambda branch, rest: 0.0, 0)
    with pytest.raises(ValueError, match="error is nan"):
        iterated_low_rank(normal(8, 8), 2, quantized, lambda branch, rest: math.nan)
