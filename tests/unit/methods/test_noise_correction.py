"""Correction of quantization noise against noise that was made by its formula, and against the formulas of PTQD."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, calibrated, quantizable
from tests.helpers.sampling import SCHEDULE, SHAPE
from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.methods.noise_correction import NoiseCorrection, choose_bits
from tfmq_exp.methods.noise_statistics import NoiseMoments, NoiseStatistics
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict, trajectory
from tfmq_exp.sampling.samplers.ddim import DDIM, VarianceCalibrated
from tfmq_exp.sampling.samplers.multistep import PLMS
from tfmq_exp.sampling.scheduler import Scheduler

ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
Bias = Literal["residual", "total"]
Spread = Literal["pooled", "per_sample"]
Intercept = Literal["channel", "shared"]


def correction(
    bias: Bias = "residual", sigma: Spread = "pooled", *, keep_drift: bool = True, intercept: Intercept = "channel"
) -> NoiseCorrection:
    return NoiseCorrection(images=5, intercept=intercept, bias=bias, sigma=sigma, keep_drift=keep_drift)


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
    corrected = correction(keep_drift=keep_drift)(predict, plain, zero)
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
    by_hand, _ = sampled(found.corrected(predict), plain)
    assert torch.equal(sampled(*correction(keep_drift=keep_drift)(predict, plain, found))[0], by_hand)
    assert not torch.allclose(by_hand, expected)


def test_noisy_sampling_shrinks_its_noise_by_the_residual_of_the_corrected_prediction() -> None:
    found = statistics(sigma=0.01)
    _, sampling = correction()(lambda x, *_: x, Sampling(DDIM(4, 1.0)), found)
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
    steps = list(trajectory(Sampling(DDIM(4)).predictor(denoiser.unet), DDIM(4), SCHEDULE, x, generators, Conditions()))
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
    with pytest.raises(
        ValueError, match=r"the noise of a DDIMScheduler cannot be calibrated, only that of DDIM: choose"
    ):
        correction.check(folder)
    for sampler in (dataclasses.replace(folder, eta=0.0), PLMS(4), DDIM(4, 1.0)):
        correction.check(sampler)
