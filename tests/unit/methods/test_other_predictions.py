"""Correction of networks that predict a velocity or the clean sample: the one of a network that predicts the noise in them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tests.helpers.sampling import SCHEDULE, SHAPE
from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.denoisers.loading.scheduler_config import FLOW, default_settings
from tfmq_exp.methods.noise_correction import NoiseCorrection
from tfmq_exp.methods.noise_statistics import NoiseStatistics
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler, finite
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.prediction import Mixtures
from tfmq_exp.sampling.trajectory import Moves, Sampler, trajectory

CORRECTION = NoiseCorrection(3, "channel", "residual", "pooled", True)
Function = Callable[..., Any]
BETAS: Any = DDIMScheduler(**SCHEDULE)
# down to a timestep whose noise is more than float32's rounding of a clean sample
PLAIN = {**SCHEDULE, "clip_sample": False, "steps_offset": 50}


def float_noise(x: Tensor, t: Tensor) -> Tensor:
    """Some function of input and timestep, bounded as noise is."""
    return (1.3 * x + 0.3 * x.roll(1, 3) + 0.001 * t.reshape(-1, 1, 1, 1)).tanh()


def quantized_noise(x: Tensor, t: Tensor) -> Tensor:
    """The same with errors that correlate with it, differ between channels, and look random."""
    exact = float_noise(x, t)
    return 1.1 * exact + 0.05 * torch.arange(3.0).reshape(3, 1, 1) + 0.05 * (40 * x).sin()


def by_betas(kind: str) -> Callable[[Function], Function]:
    """A network that predicts noise as one that predicts something else, by diffusers' own relations."""

    def converted(noise: Function) -> Function:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            eps, clean = noise(x, t), []
            for row, of_row, when in zip(x, eps, t.tolist(), strict=True):
                scheduler: Any = DDIMScheduler(**SCHEDULE, clip_sample=False)
                scheduler.set_timesteps(10)
                clean.append(scheduler.step(of_row, when, row).pred_original_sample)
            x0 = torch.stack(clean)
            return x0 if kind == "sample" else BETAS.get_velocity(x0, eps, t)

        return predict

    return converted


def velocity_of_flow(noise: Function) -> Function:
    """v = eps - x_0 with x_0 from x = (1 - s) x_0 + s eps."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        s, eps = t.reshape(-1, 1, 1, 1) / 1000, noise(x, t)
        return eps - (x - s * eps) / (1 - s)

    return predict


def model_of(function: Function, timesteps: Sequence[float]) -> Any:
    """What the correction asks of a quantized network."""
    network = as_network(function)
    return SimpleNamespace(
        context=TimestepContext(timesteps), activation_bits=lambda: (), for_timesteps=lambda _: network
    )


def as_network(function: Function) -> Any:
    return lambda x, timestep: SimpleNamespace(sample=function(x, timestep))


@dataclass(frozen=True)
class OfNoise:
    """A sampler of a flow for a network that predicts noise."""

    sampler: Sampler
    eta: float = 0.0

    def calls(self, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
        return self.sampler.calls(schedule)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        moves, calls = self.sampler.start(schedule), self.calls(schedule)

        def move(call: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            t = torch.full((len(x),), calls[call])
            return moves.move(call, velocity_of_flow(lambda *_: prediction)(x, t), x, generators)

        return moves._replace(move=move)


def folder(kind: str, steps: int = 10, **settings: Any) -> Scheduler:
    known = finite(default_settings(kind), default_settings(kind)) | settings
    return Scheduler(kind, known, steps)


FLOWING = SigmaScheduler("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000}, sigmas=(0.95, 0.6, 0.25))


def corrected_trajectory(
    denoiser: Denoiser, schedule: Mapping[str, Any], sampler: Sampler, exact: Function, quantized: Function
) -> tuple[NoiseStatistics, Tensor, Tensor]:
    """Statistics, and the quantized network's images with and without the correction."""
    timesteps, sampling = tuple(dict.fromkeys(sampler.calls(schedule))), Sampling(sampler)
    float_denoiser: Any = SimpleNamespace(
        network=as_network(exact), schedule=schedule, sample_shape=SHAPE, device=torch.device("cpu"),
        encoder=denoiser.encoder,
    )  # fmt: skip
    model = model_of(quantized, timesteps)
    found = CORRECTION.measure(model, float_denoiser, sampling, seed=1, batch=2)
    plain = sampling.predictor(model.for_timesteps(timesteps))
    predict, changed = CORRECTION(plain, sampling, found, schedule)
    images = []
    for each in (predict, plain):
        generators = image_generators(7, "images", range(2))
        x = initial_noise(generators, SHAPE, torch.device("cpu"))
        *_, last = trajectory(each, changed.sampler, schedule, x, generators, Conditions())
        images.append(last.x_next)
    return found, images[0], images[1]


@pytest.mark.parametrize(
    ("schedule", "of_noise", "sampler", "convert"),
    [
        (
            {**SCHEDULE, "prediction_type": kind},
            folder("DDIMScheduler", **PLAIN),
            folder("DDIMScheduler", **PLAIN, prediction_type=kind),
            by_betas(kind),
        )
        for kind in ("v_prediction", "sample")
    ]
    + [({"num_train_timesteps": 1000, "prediction_type": FLOW}, OfNoise(FLOWING), FLOWING, velocity_of_flow)],
    ids=["v_prediction", "sample", "flow"],
)
def test_a_network_and_the_same_one_that_predicts_something_else_are_corrected_alike(
    denoiser: Denoiser, schedule: dict[str, Any], of_noise: Sampler, sampler: Sampler, convert: Any
) -> None:
    expected = corrected_trajectory(denoiser, SCHEDULE, of_noise, float_noise, quantized_noise)
    found = corrected_trajectory(denoiser, schedule, sampler, convert(float_noise), convert(quantized_noise))
    for name in ("k", "bias", "sigma"):
        torch.testing.assert_close(getattr(found[0], name), getattr(expected[0], name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5 * float(expected[1].abs().max()))
    assert float((found[1] - found[2]).abs().max()) > 0.02 * float(expected[1].abs().max())


@pytest.mark.parametrize("negated", [False, True])
def test_the_first_step_of_a_flow_is_left_as_it_is_and_the_others_imply_the_corrected_noise(*, negated: bool) -> None:
    """As Lumina 2 counts: 1 - t / 1000, and the negative of the velocity."""
    schedule, flow = (
        {"num_train_timesteps": 1000, "prediction_type": FLOW},
        folder("FlowMatchEulerDiscreteScheduler", 4),
    )
    convention = NetworkConvention((("divide", 1000.0), ("subtract_from", 1.0)), negated)
    sampler, sign = PipelineSampler(flow, convention), -1 if negated else 1
    timesteps = sampler.calls(schedule)
    implied = Mixtures.of(sampler, schedule, timesteps).implied_noise()
    found = NoiseStatistics(
        timesteps, torch.full((4,), 0.3), torch.ones(4), torch.full((4, 3), 0.1), torch.full((4,), 0.2)
    )
    x, v = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    corrected = sign * found.corrected(lambda *_: sign * v, implied)(x, torch.tensor(timesteps), Conditions())
    assert torch.equal(corrected[0], v[0])
    for step in range(1, 4):
        s = 1 - timesteps[step]
        noise, after = (x[step] + (1 - s) * y[step] for y in (v, corrected))
        torch.testing.assert_close(after, (noise - 0.1) / 1.3, rtol=1e-4, atol=1e-5)


def test_channels_of_packed_samples_are_the_last_axis() -> None:
    schedule, flow = {"num_train_timesteps": 1000, "prediction_type": FLOW}, FLOWING
    timesteps = flow.calls(schedule)
    bias = torch.arange(15.0).reshape(3, 5)
    found = NoiseStatistics(timesteps, torch.zeros(3), torch.ones(3), bias, torch.zeros(3))
    implied = Mixtures.of(flow, schedule, timesteps).implied_noise()
    x = torch.zeros(3, 7, 5)
    corrected = found.corrected(lambda *_: x, implied)(x, torch.tensor(timesteps), Conditions())
    for step, t in enumerate(timesteps):
        torch.testing.assert_close(corrected[step], (-bias[step] / (1 - t / 1000)).expand(7, 5))


def test_mixtures_between_two_timesteps_are_those_of_diffusers_inverse() -> None:
    """EulerDiscreteScheduler with Karras' sigmas visits real timesteps, found from the logarithms of sigma."""
    sampler = folder("EulerDiscreteScheduler", 7, **SCHEDULE, use_karras_sigmas=True)
    made, schedule = sampler.scheduler(), SCHEDULE | {"prediction_type": "v_prediction"}
    found = Mixtures.of(sampler, schedule, sampler.calls(schedule))
    torch.testing.assert_close((found.noise / found.signal).float(), made.sigmas[:-1].float(), rtol=2e-4, atol=0)
    zero = dataclasses.replace(sampler, settings={**sampler.settings, "timestep_type": "continuous"})
    with pytest.raises(ValueError, match="timestep_type=continuous counts in logarithms of sigma"):
        Mixtures.of(zero, schedule, zero.calls(schedule))
