"""DDIM whose variance is calibrated, against the formula in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from tfmq_exp.core.seeds import image_generators
from tfmq_exp.sampling.samplers import DDIM, VarianceCalibrated

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
SHAPE = (3, 8, 8)


def standard_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calibrated_ddim(steps: int, eta: float, residual: float, *, keep_drift: bool = True) -> VarianceCalibrated:
    plain = DDIM(steps, eta)
    return VarianceCalibrated(plain, dict.fromkeys(plain.calls(SCHEDULE), residual), keep_drift)


def coefficients(step: int, steps: int, eta: float) -> tuple[float, float, float]:
    """Alpha, alpha of the next timestep, sigma^2 of DDIM (arXiv 2010.02502, eq. 16)."""
    jump = 1000 // steps
    t = 1 + jump * (steps - 1 - step)
    alpha, following = float(ALPHAS[t]), float(ALPHAS[t - jump] if t >= jump else ALPHAS[0])
    return alpha, following, eta**2 * (1 - following) / (1 - alpha) * (1 - alpha / following)


def remaining_variance(step: int, steps: int, eta: float, residual: float) -> float:
    """max(0, sigma^2 - B^2 s^2)."""
    alpha, following, variance = coefficients(step, steps, eta)
    b = math.sqrt(1 - following - variance) - math.sqrt(following * (1 - alpha) / alpha)
    return max(0.0, variance - b**2 * residual**2)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("residual", [0.0, 0.01, 0.1, 0.5, 3.0, 100.0])
def test_remaining_noise_is_what_the_formula_leaves_and_never_negative(steps: int, eta: float, residual: float) -> None:
    sampler = calibrated_ddim(steps, eta, residual)
    move, shares, zeros = (
        sampler.start(SCHEDULE).move,
        sampler.remaining(SCHEDULE),
        torch.zeros(2, *SHAPE, dtype=torch.float64),
    )
    for step in range(steps):
        drawn = torch.stack(
            [torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in image_generators(3, "n", range(2))]
        )
        added = move(step, zeros, zeros, image_generators(3, "n", range(2)))
        deviation = math.sqrt(remaining_variance(step, steps, eta, residual))
        torch.testing.assert_close(added, deviation * drawn, rtol=1e-3, atol=1e-5)
        assert 0 <= shares[step] <= 1
    if residual == 100:
        assert not any(shares)


@pytest.mark.parametrize("keep_drift", [True, False])
@pytest.mark.parametrize("residual", [0.05, 0.3])
def test_only_the_release_changes_the_drift(keep_drift: bool, residual: float) -> None:
    steps, eta = 20, 1.0
    sampler = calibrated_ddim(steps, eta, residual, keep_drift=keep_drift)
    move = sampler.start(SCHEDULE).move
    x, eps = standard_normal(2, 2, *SHAPE, seed=4)
    differences = []
    for step in range(steps):
        alpha, following, variance = coefficients(step, steps, eta)
        left = remaining_variance(step, steps, eta, residual)
        clean = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        noise = torch.stack(
            [torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in image_generators(3, "n", range(2))]
        )
        moved = [
            math.sqrt(following) * clean + math.sqrt(1 - following - used) * eps + math.sqrt(left) * noise
            for used in (variance, left)
        ]
        taken = move(step, eps, x, image_generators(3, "n", range(2)))
        torch.testing.assert_close(taken, moved[0 if keep_drift else 1], rtol=1e-3, atol=1e-4)
        differences.append(float((moved[0] - moved[1]).abs().max()))
    assert max(differences) > 0.01


@pytest.mark.parametrize("steps", [4, 20, 200])
def test_ddim_form_is_the_ddpm_form_for_eta_1(steps: int) -> None:
    k, sigma_q = 0.2, 0.3
    sampler = calibrated_ddim(steps, 1.0, sigma_q / (1 + k))
    shares = sampler.remaining(SCHEDULE)
    shrunk = 0
    for step in range(steps):
        cumulative, following, variance = coefficients(step, steps, 1.0)
        alpha = cumulative / following
        beta = 1 - alpha
        assert variance == pytest.approx((1 - following) / (1 - cumulative) * beta)
        expected = variance - beta**2 / (alpha * (1 - cumulative) * (1 + k) ** 2) * sigma_q**2
        assert shares[step] ** 2 * variance == pytest.approx(max(0, expected), rel=1e-3, abs=1e-7)
        shrunk += 0 < expected < 0.999 * variance
    assert shrunk
