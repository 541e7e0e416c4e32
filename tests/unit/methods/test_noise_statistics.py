"""Noise statistics: against synthetic noise, and formulas written down per pixel."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import TIMESTEPS
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.methods.noise_correction import NoiseCorrection
from tfmq_exp.methods.noise_statistics import NoiseMoments, NoiseStatistics

SHAPE = (3, 8, 8)
IMAGES, CHANNELS, SIDE = 64, 3, 16
T = (901, 501, 1)
K, SIGMA = (0.2, 0.05, 0.5), (0.3, 0.1, 0.05)
MU = torch.tensor([[0.5, -0.2, 0.0], [0.01, 0.0, -0.3], [1.0, 1.0, -1.0]], dtype=torch.float64)
Bias = Literal["residual", "total"]
Spread = Literal["pooled", "per_sample"]
Intercept = Literal["channel", "shared"]


def correction(
    bias: Bias = "residual", sigma: Spread = "pooled", *, keep_drift: bool = True, intercept: Intercept = "channel"
) -> NoiseCorrection:
    return NoiseCorrection(images=5, intercept=intercept, bias=bias, sigma=sigma, keep_drift=keep_drift)


def standard_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def synthetic(seed: int = 0, mean: float = 0.0, sign: int = 1) -> tuple[Tensor, Tensor]:
    """Float prediction e and noise d = k e + mu_c + N(0, sigma^2); `mean` times the channel is that of e."""
    e, noise = standard_normal(2, len(T), IMAGES, CHANNELS, SIDE, SIDE, seed=seed)
    e = 0.8 * e + mean * torch.arange(CHANNELS)[:, None, None]
    k, sigma = (torch.tensor(values, dtype=torch.float64)[:, None, None, None, None] for values in (K, SIGMA))
    return e, sign * k * e + MU[:, None, :, None, None] + sigma * noise


def test_synthetic_noise_is_recovered_within_sampling_error() -> None:
    found = correction().estimate(NoiseMoments.of(*synthetic(mean=0.5)), T)
    samples = IMAGES * SIDE**2
    for step in range(len(T)):
        of_k = 5 * SIGMA[step] / 0.8 / math.sqrt(CHANNELS * samples)
        assert float(found.k[step]) == pytest.approx(K[step], abs=of_k)
        of_mean = 5 * SIGMA[step] / math.sqrt(samples)
        assert found.bias[step].tolist() == pytest.approx(MU[step].tolist(), abs=of_mean + 1.1 * of_k)
        of_sigma = 5 / math.sqrt(2 * CHANNELS * samples)
        assert float(found.sigma[step]) == pytest.approx(SIGMA[step], rel=of_sigma + (of_k / SIGMA[step]) ** 2)
    assert found.timesteps == T
    assert found.bits == ()


def test_corrected_prediction_has_no_mean_error_and_less_spread() -> None:
    found = correction().estimate(NoiseMoments.of(*synthetic()), T)
    fresh_e, fresh_d = synthetic(seed=1)
    for step, t in enumerate(T):
        predict = found.corrected(lambda x, *_, step=step: x + fresh_d[step])
        error = predict(fresh_e[step], torch.full((IMAGES,), t), Conditions()) - fresh_e[step]
        residual = SIGMA[step] / (1 + K[step])
        assert error.mean((0, 2, 3)).tolist() == pytest.approx([0] * CHANNELS, abs=0.02)
        assert float(error.std()) == pytest.approx(residual, rel=0.02)
        assert float(found.residual[step]) == pytest.approx(residual, rel=0.02)
        assert float(error.square().mean()) < 0.9 * float(fresh_d[step].square().mean())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bias", ["residual", "total"])
@pytest.mark.parametrize("sigma", ["pooled", "per_sample"])
@pytest.mark.parametrize("intercept", ["channel", "shared"])
def test_estimates_are_the_formulas(bias: Bias, sigma: Spread, intercept: Intercept, sign: int) -> None:
    tensors = synthetic(mean=0.5, sign=sign)
    found = correction(bias, sigma, intercept=intercept).estimate(NoiseMoments.of(*tensors), T)
    for step, (e, d) in enumerate(zip(*(x.numpy() for x in tensors), strict=True)):
        about = (0, 2, 3) if intercept == "channel" else None
        from_e, from_d = ((x - x.mean(about, keepdims=True)).flatten() for x in (e, d))
        slope = np.polyfit(from_e, from_d, 1)[0]
        k = max(slope, 0)
        rest = d - k * e
        mean = (rest if bias == "residual" else d).mean((0, 2, 3))
        pooled = math.sqrt(np.mean([rest[:, c].var() for c in range(CHANNELS)]))
        per_sample = np.mean([rest[i].std(ddof=1) for i in range(IMAGES)])
        assert float(found.k[step]) == pytest.approx(k, rel=1e-5, abs=1e-9)
        assert float(found.r2[step]) == pytest.approx(np.corrcoef(from_e, from_d)[0, 1] ** 2, rel=1e-4)
        assert found.bias[step].tolist() == pytest.approx(mean.tolist(), rel=1e-4, abs=1e-6)
        assert float(found.sigma[step]) == pytest.approx(pooled if sigma == "pooled" else per_sample, rel=1e-4)
    assert bool((found.k > 0).any()) is (sign > 0)


def test_joined_batches_are_one_batch() -> None:
    e, d = synthetic(mean=0.5)
    whole = NoiseMoments.of(e, d)
    parts = [slice(0, 10), slice(10, 11), slice(11, IMAGES)]
    rows = [[NoiseMoments.of(e[s : s + 1, p], d[s : s + 1, p]) for s in range(len(T))] for p in parts]
    joined = NoiseMoments.join(rows)
    for one, other in zip(dataclasses.astuple(joined), dataclasses.astuple(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    spreads: tuple[Spread, ...] = ("pooled", "per_sample")
    for sigma in spreads:
        estimates = [correction(sigma=sigma).estimate(m, T).tensors() for m in (joined, whole)]
        torch.testing.assert_close(*estimates)


def test_signal_to_noise_is_a_quotient_of_mean_squares() -> None:
    e, d = synthetic(mean=0.5)
    expected = [float(e[step].square().mean() / d[step].square().mean()) for step in range(len(T))]
    assert NoiseMoments.of(e, d).signal_to_noise().tolist() == pytest.approx(expected, rel=1e-9)


def test_no_noise_gives_zero_statistics() -> None:
    e, _ = synthetic()
    for sigma in ("pooled", "per_sample"):
        found = correction(sigma=sigma).estimate(NoiseMoments.of(e, torch.zeros_like(e)), T)  # type: ignore[arg-type]
        assert not any(bool(x.any()) for x in (found.k, found.r2, found.bias, found.sigma))


def statistics(k: float = 0.3, sigma: float = 0.2, bits: tuple[int, ...] = ()) -> NoiseStatistics:
    """Of four steps, different at each."""
    steps = torch.arange(1.0, 5.0)
    bias = torch.stack([steps, -steps, 0.5 * steps], dim=1)
    return NoiseStatistics(TIMESTEPS, k * steps, steps / 10, bias, sigma * steps, bits)


def test_every_row_is_corrected_with_the_statistics_of_its_own_step() -> None:
    found, x, t = statistics(), torch.randn(5, *SHAPE), torch.tensor([1, 751, 251, 251, 501])
    corrected = found.corrected(lambda x, t, _: x * t.reshape(-1, 1, 1, 1))(x, t, Conditions())
    for row, when in enumerate(t.tolist()):
        step = TIMESTEPS.index(when)
        for channel in range(3):
            expected = (x[row, channel] * when - found.bias[step, channel]) / (1 + found.k[step])
            assert torch.equal(corrected[row, channel], expected)


@pytest.mark.parametrize("bits", [(), (4, 4, 8, 8)])
def test_statistics_survive_their_tensors(tmp_path: Path, bits: tuple[int, ...]) -> None:
    found = statistics(bits=bits)
    save_file(found.tensors(), tmp_path / "statistics.safetensors")
    back = NoiseStatistics.of(load_file(tmp_path / "statistics.safetensors"))
    assert (back.timesteps, back.bits) == (TIMESTEPS, bits)
    for name in ("k", "r2", "bias", "sigma"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    rows = back.rows()
    assert [row["bits"] for row in rows] == list(bits or (None,) * 4)
    assert [row["bias_rms"] for row in rows] == pytest.approx([s * math.sqrt(2.25 / 3) for s in (1, 2, 3, 4)])
