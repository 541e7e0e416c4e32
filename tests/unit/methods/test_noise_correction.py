"""Correction of quantization noise against noise that was made by its formula, and against the formulas of PTQD."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, calibrated, quantizable
from tests.helpers.sampling import SCHEDULE, SHAPE
from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.methods.noise_correction import NoiseCorrection, choose_bits
from tfmq_exp.methods.noise_statistics import NoiseMoments, NoiseStatistics
from tfmq_exp.sampling.diffusers_scheduler import Scheduler
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.prediction import ImpliedNoise
from tfmq_exp.sampling.samplers import DDIM, PLMS, VarianceCalibrated
from tfmq_exp.sampling.trajectory import Predict, trajectory

ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
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


def itself(steps: int) -> ImpliedNoise:
    """Of a network that predicts noise."""
    return ImpliedNoise(torch.zeros(steps).double(), torch.ones(steps).double())


def statistics(k: float = 0.3, sigma: float = 0.2, bits: tuple[int, ...] = ()) -> NoiseStatistics:
    """Of four steps, different at each."""
    steps = torch.arange(1.0, 5.0)
    bias = torch.stack([steps, -steps, 0.5 * steps], dim=1)
    return NoiseStatistics(TIMESTEPS, k * steps, steps / 10, bias, sigma * steps, bits)


def sampled(predict: Predict, sampling: Sampling) -> tuple[Tensor, list[Tensor]]:
    """Final images, and where the generators stand afterwards."""
    generators = image_generators(7, "images", range(2))
    x = initial_noise(generators, SHAPE, torch.device("cpu"))
    *_, last = trajectory(predict, sampling.sampler, SCHEDULE, x, generators, Conditions())
    return last.x_next, [generator.get_state() for generator in generators]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keep_drift", [True, False])
def test_zero_statistics_reproduce_ddim_bit_by_bit(tiny_unet: nn.Module, eta: float, keep_drift: bool) -> None:
    zero = NoiseStatistics(TIMESTEPS, torch.zeros(4), torch.zeros(4), torch.zeros(4, 3), torch.zeros(4))
    plain = Sampling(DDIM(4, eta))
    predict = plain.predictor(tiny_unet)
    corrected = correction(keep_drift=keep_drift)(predict, plain, zero, SCHEDULE)
    calibrated_sampler = Sampling(VarianceCalibrated(DDIM(4, eta), dict.fromkeys(TIMESTEPS, 0.0), keep_drift))
    expected, states = sampled(predict, plain)
    assert torch.equal(sampled(*corrected)[0], expected)
    final, states_after = sampled(predict, calibrated_sampler)
    assert torch.equal(final, expected)
    if eta:
        assert all(map(torch.equal, states_after, states))


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("keep_drift", [True, False])
def test_deterministic_sampling_adds_no_noise_for_any_sigma(
    tiny_unet: nn.Module, sigma: float, keep_drift: bool
) -> None:
    plain = Sampling(DDIM(4, 0.0))
    predict = plain.predictor(tiny_unet)
    expected, _ = sampled(predict, plain)
    calibrated_sampler = VarianceCalibrated(DDIM(4), dict.fromkeys(TIMESTEPS, sigma), keep_drift)
    assert torch.equal(sampled(predict, Sampling(calibrated_sampler))[0], expected)
    found = statistics(sigma=sigma)
    by_hand, _ = sampled(found.corrected(predict, itself(4)), plain)
    assert torch.equal(sampled(*correction(keep_drift=keep_drift)(predict, plain, found, SCHEDULE))[0], by_hand)
    assert not torch.allclose(by_hand, expected)


def test_noisy_sampling_shrinks_its_noise_by_the_residual_of_the_corrected_prediction() -> None:
    found = statistics(sigma=0.01)
    _, sampling = correction()(lambda x, *_: x, Sampling(DDIM(4, 1.0)), found, SCHEDULE)
    sampler = sampling.sampler
    assert isinstance(sampler, VarianceCalibrated)
    assert list(sampler.residual) == list(TIMESTEPS)
    assert list(sampler.residual.values()) == pytest.approx([0.01 * s / (1 + 0.3 * s) for s in (1, 2, 3, 4)])


def test_fewest_bits_whose_signal_to_noise_exceeds_the_process() -> None:
    generator = torch.Generator().manual_seed(0)
    alphas = torch.rand(200, generator=generator, dtype=torch.float64)
    snr = {bits: 10 ** (4 * torch.rand(200, generator=generator) - 2) for bits in (8, 4, 6)}
    chosen = choose_bits(snr, alphas)
    for step in range(200):
        best = 8
        for bits in (6, 4):
            if float(snr[bits][step]) > float(alphas[step]) / (1 - float(alphas[step])):
                best = bits
        assert chosen[step] == best
    assert set(chosen) == {4, 6, 8}


def test_equal_signal_to_noise_does_not_exceed() -> None:
    assert choose_bits({4: torch.tensor([1.0]), 8: torch.tensor([1.0])}, torch.tensor([0.5])) == (8,)


def measured(denoiser: Denoiser, model: Any, batch: int) -> NoiseStatistics:
    return correction().measure(model, denoiser, Sampling(DDIM(4)), seed=3, batch=batch)


@torch.no_grad()
def noise_on_the_float_path(denoiser: Denoiser, model: Any) -> tuple[Tensor, Tensor]:
    """E and d of every step, all images at once."""
    generators = image_generators(3, "correction", range(5))
    x = initial_noise(generators, SHAPE, torch.device("cpu"))
    steps = list(
        trajectory(Sampling(DDIM(4)).predictor(denoiser.network), DDIM(4), SCHEDULE, x, generators, Conditions())
    )
    noise = [model(step.x, torch.tensor(step.t)).sample - step.eps for step in steps]
    return torch.stack([step.eps for step in steps]), torch.stack(noise)


def test_measured_statistics_are_those_of_the_float_path(denoiser: Denoiser, tiny_unet: nn.Module) -> None:
    model, seen = calibrated(quantizable(tiny_unet)), list[int]()
    expected = correction().estimate(NoiseMoments.of(*noise_on_the_float_path(denoiser, model)), TIMESTEPS)
    found = correction().measure(model, denoiser, Sampling(DDIM(4)), seed=3, batch=2, each_step=seen.append)
    for name in ("k", "r2", "bias", "sigma"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-2, atol=2e-3)
    assert found.bits == ()
    assert seen == list(range(1, 13))
    assert bool((found.sigma > 0).all())


def test_each_step_has_the_statistics_of_the_width_chosen_for_it(denoiser: Denoiser, tiny_unet: nn.Module) -> None:
    model = calibrated(quantizable(tiny_unet, weight=8, activation=(4, 8)))
    found = measured(denoiser, model, 5)
    by_bits: dict[int, NoiseMoments] = {}
    for bits in (4, 8):
        model.use_bits([bits] * 4)
        by_bits[bits] = NoiseMoments.of(*noise_on_the_float_path(denoiser, model))
    snr = {bits: moments.signal_to_noise() for bits, moments in by_bits.items()}
    assert found.bits == choose_bits(snr, ALPHAS[list(TIMESTEPS)])
    for step, bits in enumerate(found.bits):
        expected = correction().estimate(by_bits[bits], TIMESTEPS)
        for name in ("k", "r2", "bias", "sigma"):
            torch.testing.assert_close(getattr(found, name)[step], getattr(expected, name)[step], rtol=1e-3, atol=1e-5)
    assert found.bits[0] == 4  # next to pure noise the process has next to no signal
    assert found.bits[-1] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, r"images must be a whole number, at least 1 .*, got 0"),
        ({"bias": "all"}, "'all'"),
        ({"sigma": "max"}, "'max'"),
    ],
)
def test_impossible_corrections_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(correction(), **change)


def test_noise_of_other_samplers_is_refused_before_anything_is_measured() -> None:
    folder = Scheduler("DDIMScheduler", {"num_train_timesteps": 1000}, 4, eta=1.0)
    correction = NoiseCorrection(4, "channel", "residual", "pooled", True)
    with pytest.raises(ValueError, match=r"the noise of a DDIMScheduler cannot be calibrated: choose sampler=ddim"):
        correction.check(folder)
    for sampler in (dataclasses.replace(folder, eta=0.0), PLMS(4), DDIM(4, 1.0)):
        correction.check(sampler)


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
        predict = found.corrected(lambda x, *_, step=step: x + fresh_d[step], itself(3))
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


def test_every_row_is_corrected_with_the_statistics_of_its_own_step() -> None:
    found, x, t = statistics(), torch.randn(5, *SHAPE), torch.tensor([1, 751, 251, 251, 501])
    corrected = found.corrected(lambda x, t, _: x * t.reshape(-1, 1, 1, 1), itself(4))(x, t, Conditions())
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
