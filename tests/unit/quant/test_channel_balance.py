"""Channel balance and salience against loops, scipy, and the product that they must not change."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import linear

from tfmq_exp.quant.transforms.channel_balance import (
    balance,
    balance_exponents,
    channel_maxima,
    row_maxima,
    running_maxima,
    search_balance,
    tied_maxima,
)
from tfmq_exp.quant.transforms.salience import ranks, salience, spearman


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_maxima_are_those_of_a_loop() -> None:
    x = normal(3, 5, 4)
    assert channel_maxima(x).tolist() == [max(abs(float(v)) for v in x[..., c].flatten()) for c in range(4)]
    assert row_maxima(x).tolist() == [[max(abs(float(v)) for v in row[:, c]) for c in range(4)] for row in x]
    assert row_maxima(x[:, 0]).equal(x[:, 0].abs())
    assert tied_maxima([x[0], x[1:].flatten(0, 1)]).equal(channel_maxima(x))


def test_running_maxima_move_towards_each_batch() -> None:
    batches, expected, running = normal(4, 3, 5, 2), [0.0, 0.0], None
    for i, batch in enumerate(batches):
        running = running_maxima(running, batch, momentum=0.8)
        means = [sum(float(row[:, c].abs().max()) for row in batch) / 3 for c in range(2)]
        expected = means if i == 0 else [0.8 * old + 0.2 * new for old, new in zip(expected, means, strict=True)]
        assert running.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.3, 0.7), (0.5, 0.5), (0.8, 0.0)])
def test_balance_is_the_formula_and_changes_no_output(alpha: float, beta: float) -> None:
    x, weight = normal(4, 6, 8).double() * torch.logspace(-2, 2, 8), normal(5, 8, seed=1).double()
    a, w = channel_maxima(x), channel_maxima(weight)
    s = balance(a, w, alpha, beta)
    assert s.tolist() == pytest.approx([float(p) ** alpha / float(q) ** beta for p, q in zip(a, w, strict=True)])
    torch.testing.assert_close(linear(x / s, weight * s), linear(x, weight), rtol=0, atol=1e-12 * 1e3)


def test_equal_exponents_balance_both_sides() -> None:
    """After CSB the largest magnitudes of an input channel and of its weights are both the geometric mean."""
    x, weight = normal(4, 6, 8) * torch.logspace(-2, 2, 8), normal(5, 8, seed=1)
    s = balance(channel_maxima(x), channel_maxima(weight), 0.5, 0.5)
    torch.testing.assert_close(channel_maxima(x / s), channel_maxima(weight * s), rtol=1e-5, atol=0)


def test_channels_without_values_keep_their_scale() -> None:
    s = balance(torch.tensor([0.0, 4.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]), 0.5, 0.5)
    assert s.tolist() == [1.0, 1.0, 1.0, 2.0]


def test_exponents_of_the_search() -> None:
    found = balance_exponents(4)
    expected = [(0, 0), (0.25, 0), (0.5, 0), (0.75, 0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    assert found == expected
    assert len(balance_exponents()) == 39


def test_the_search_takes_the_last_of_the_smallest_errors() -> None:
    a, w = torch.tensor([4.0, 9.0]), torch.tensor([1.0, 4.0])
    exponents = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (1.0, 0.0)]
    errors = {1.0: math.nan, 2.0: 3.0, 4.0: 3.5}
    found = search_balance(a, w, exponents, lambda s: errors[float(s[0])])
    assert found.best == 2
    assert found.scale.tolist() == [2.0, 1.5]
    assert found.errors[1:] == [3.0, 3.0, 3.5]
    with pytest.raises(ValueError, match="error is a number"):
        search_balance(a, w, exponents, lambda s: math.nan)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipy_s(ties: bool) -> None:
    x, y = normal(6, 30), normal(30, seed=1)
    if ties:
        x, y = x.round(), (2 * y).round()
    found = spearman(x, y)
    assert found.tolist() == pytest.approx([spearmanr(row.numpy(), y.numpy()).statistic for row in x], abs=1e-12)
    assert float(spearman(y, -y)) == pytest.approx(-1)


def test_equal_values_share_their_rank_and_correlate_with_nothing() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman(torch.ones(5), torch.arange(5.0)).item() == 0


def test_salience_weighs_rows_by_their_correlation() -> None:
    activations, weights = normal(5, 12).abs(), normal(12, seed=1).abs()
    rho = [float(spearmanr(row.numpy(), weights.numpy()).statistic) for row in activations]
    total = sum(math.exp(-r) for r in rho)
    expected = [
        sum(math.exp(-r) / total * float(row[c]) for r, row in zip(rho, activations, strict=True)) for c in range(12)
    ]
    assert salience(activations, weights).tolist() == pytest.approx(expected, rel=1e-5)
