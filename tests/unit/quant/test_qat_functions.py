"""QAT quantizer functions against their papers' formulas, value by value."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil
from tfmq_exp.quant.spec import IntRange

SIGNED, UNSIGNED = IntRange(-7, 7, 50), IntRange(0, 15, 50)

Derivatives = tuple[float, ...]  # a value, and its derivatives: to x, then to the range parameters


def values(ints: IntRange, step: float) -> Tensor:
    """All over the grid and beyond both ends, none where a derivative jumps."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * step * ints.qmax if ints.qmin < 0 else (x + 0.5) * step * ints.qmax


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def matches(x: Tensor, out: Tensor, ranges: tuple[Tensor, ...], oracle: Callable[[float], Derivatives]) -> None:
    """Compare with an oracle's values and derivatives under a random gradient of the loss."""
    above = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(above)
    expected = [oracle(value) for value in x.tolist()]
    torch.testing.assert_close(out, torch.tensor([row[0] for row in expected], dtype=torch.float64))
    own = torch.tensor([row[1] for row in expected], dtype=torch.float64)
    torch.testing.assert_close(x.grad, above * own)
    for i, parameter in enumerate(ranges):
        total = sum(float(g) * row[2 + i] for g, row in zip(above, expected, strict=True))
        assert float(parameter.grad) == pytest.approx(total, rel=1e-9)  # type: ignore[arg-type]


# formulas


@pytest.mark.parametrize("ints", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("scaled", [True, False])
def test_lsq(ints: IntRange, scaled: bool) -> None:
    """LSQ, eq. 1 to 3 and section 2.2."""
    step = leaf(0.3)
    factor = 1 / math.sqrt(ints.num_values * ints.qmax) if scaled else 1.0

    def oracle(x: float) -> Derivatives:
        u = x / 0.3
        if u <= ints.qmin:
            return 0.3 * ints.qmin, 0, factor * ints.qmin
        if u >= ints.qmax:
            return 0.3 * ints.qmax, 0, factor * ints.qmax
        return 0.3 * round(u), 1, factor * (round(u) - u)

    x = values(ints, 0.3).requires_grad_(True)
    matches(x, Lsq(scaled=scaled)(x, step, ints, {}), (step,), oracle)


@pytest.mark.parametrize("ints", [SIGNED, UNSIGNED])
def test_pact(ints: IntRange) -> None:
    """PACT: y = (|x| - |x - alpha| + alpha) / 2 rounded; d y / d alpha is 1 where x >= alpha, 0 elsewhere; signed likewise."""
    alpha = leaf(2.0)

    def oracle(x: float) -> Derivatives:
        y = 0.5 * (abs(x) - abs(x - 2.0) + 2.0) if ints.qmin == 0 else min(max(x, -2.0), 2.0)
        rounded = round(y * ints.qmax / 2.0) * 2.0 / ints.qmax
        below = x <= 0 if ints.qmin == 0 else x <= -2.0
        return rounded, float(not below and x < 2.0), (1.0 if x >= 2.0 else -1.0 if below and ints.qmin < 0 else 0.0)

    x = values(ints, 2.0 / ints.qmax).requires_grad_(True)
    matches(x, Pact()(x, alpha / ints.qmax, ints, {}), (alpha,), oracle)


@pytest.mark.parametrize("ints", [SIGNED, UNSIGNED])
def test_nipq(ints: IntRange) -> None:
    """NIPQ: x + nu Delta in the range, with derivative nu / n to alpha; +-alpha outside, with derivative +-1."""
    alpha = leaf(2.0)
    x = values(ints, 2.0 / ints.qmax).requires_grad_(True)
    torch.manual_seed(0)
    out = Nipq()(x, alpha / ints.qmax, ints, {})
    drawn = dict(zip(x.tolist(), ((out - x) * ints.qmax / 2.0).tolist(), strict=True))
    reached = [nu for value, nu in drawn.items() if 2.0 * ints.qmin / ints.qmax < value < 2.0]
    assert 10 < len(reached) < len(drawn)
    assert max(map(abs, reached)) <= 0.5
    assert len(set(reached)) == len(reached)

    def oracle(value: float) -> Derivatives:
        if value >= 2.0:
            return 2.0, 0, 1
        if value <= 2.0 * ints.qmin / ints.qmax:
            return 2.0 * ints.qmin / ints.qmax, 0, ints.qmin / ints.qmax
        return value + drawn[value] * 2.0 / ints.qmax, 1, drawn[value] / ints.qmax

    matches(x, out, (alpha,), oracle)


@pytest.mark.parametrize("ints", [SIGNED, UNSIGNED])
def test_duq(ints: IntRange) -> None:
    """DuQ: c round(clip(x / a, lo, 1) L) / L, a and c apart, gradients straight through the rounding."""
    a, c = leaf(2.0), leaf(2.3)

    def oracle(x: float) -> Derivatives:
        lowest = ints.qmin / ints.qmax
        share = min(max(x / 2.0, lowest), 1.0)
        code, inside = round(share * ints.qmax) / ints.qmax, lowest < x / 2.0 < 1
        return 2.3 * code, 2.3 / 2.0 * inside, -2.3 * x / 4.0 * inside, code

    x = values(ints, 2.0 / ints.qmax).requires_grad_(True)
    matches(x, Duq()(x, a / ints.qmax, ints, {"gain": c / a}), (a, c), oracle)


@pytest.mark.parametrize("ints", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("gamma", [None, 1.0, 0.7, 1.4])
def test_qil(ints: IntRange, gamma: float | None) -> None:
    """QIL, eq. 3: 0 below c - d, sign above c + d, (0.5 |x| / d - 0.5 c / d + 0.5)^gamma between; times c + d."""
    c, d, bend = leaf(1.2), leaf(0.8), leaf(gamma or 1.0)

    def oracle(x: float) -> Derivatives:
        sign = 0.0 if x <= 0 and ints.qmin == 0 else math.copysign(1, x)
        if abs(x) <= 0.4 or sign == 0:
            return 0, 0, 0, 0, 0
        if abs(x) >= 2.0:
            return 2.0 * sign, 0, sign, sign, 0
        w, power = 0.5 * abs(x) / 0.8 - 0.5 * 1.2 / 0.8 + 0.5, gamma or 1.0
        code, slope = round(w**power * ints.qmax) / ints.qmax, 2.0 * power * w ** (power - 1)
        to_c, to_d = -0.5 / 0.8, 0.5 * (1.2 - abs(x)) / 0.8**2
        bent = 2.0 * w**power * math.log(w)
        return (
            2.0 * code * sign,
            slope * 0.5 / 0.8,
            sign * (code + slope * to_c),
            sign * (code + slope * to_d),
            sign * bent,
        )

    x = values(ints, 2.0 / ints.qmax).requires_grad_(True)
    extra = {"pruned": (c - d) / (c + d)} | ({"gamma": bend} if gamma else {})
    out = Qil(learn_gamma=gamma is not None)(x, (c + d) / ints.qmax, ints, extra)
    matches(x, out, (c, d, bend)[: 3 if gamma else 2], oracle)


# what all have in common


def extra(form: QATQuantizeFn, seed: int = 0) -> Mapping[str, Tensor]:
    """The form's numbers, away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.tensor(f.init) + 0.3 * torch.rand((), generator=generator)
        for name, f in form.extra_params().items()
    }


# grids


# noise


# plain data
