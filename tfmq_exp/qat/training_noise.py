"""Noise of a network's training: which timesteps are drawn, what its inputs are at them, and what it is to predict."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from tfmq_exp.denoisers.loading.scheduler_config import FLOW
from tfmq_exp.quant.timestep_context import exact_timesteps, network_timesteps
from tfmq_exp.sampling.network_convention import PipelineSampler
from tfmq_exp.sampling.prediction import Mixtures
from tfmq_exp.sampling.trajectory import Sampler, alphas_cumprod

Drawn = Literal["uniform", "logit_normal"]


class TrainingNoise(NamedTuple):
    """Every timestep of the training, and the mixtures of clean sample and noise there, see `Mixtures`.

    Schedules with betas: timesteps 0 .. T - 1, uniformly. Flow matching: 1 .. T without a shift, whose share of T is the sigmoid of
    a standard normal variable (arXiv 2403.03206, section 3.1).
    """

    timesteps: tuple[float | int, ...]  # as the network is given them
    drawn: Drawn
    given: Shaped[Tensor, "training"]  # the timesteps as int64 or float32
    signal: Float32[Tensor, "training"]
    noise: Float32[Tensor, "training"]
    of_clean: Float32[Tensor, "training"]
    of_noise: Float32[Tensor, "training"]

    @classmethod
    def of(cls, schedule: Mapping[str, Any], sampler: Sampler) -> "TrainingNoise":
        """Of a network's schedule, and of the convention by which a pipeline's sampler gives it timesteps.

        Raises:
            ValueError: a prediction or betas that are not known.
        """
        count, flow = int(schedule["num_train_timesteps"]), schedule.get("prediction_type") == FLOW
        steps = [float(t) for t in range(1, count + 1)] if flow else list(range(count))
        found = Mixtures.at(schedule, steps)
        if not flow:  # in float32, as diffusers' add_noise
            kept = alphas_cumprod(schedule).float()
            found = found._replace(signal=kept.sqrt(), noise=(1 - kept).sqrt())
        convention, sign = None, 1
        if isinstance(sampler, PipelineSampler):
            convention, sign = sampler.convention, -1 if sampler.convention.negated else 1
        timesteps = tuple(map(convention, steps)) if convention else tuple(steps)
        found = found._replace(of_clean=sign * found.of_clean, of_noise=sign * found.of_noise)
        given = network_timesteps(exact_timesteps(timesteps))
        return cls(timesteps, "logit_normal" if flow else "uniform", given, *(factor.float() for factor in found))

    def to(self, device: torch.device) -> "TrainingNoise":
        return TrainingNoise(*self[:2], *(table.to(device) for table in self[2:]))

    def noisy(
        self, clean: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], t: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch *rest"]:
        """The network's input, signal x_0 + noise eps, row by row, at places `t` in the list of timesteps."""
        return mixed(clean, self.signal[t], noise, self.noise[t])

    def target(
        self, clean: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], t: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch *rest"]:
        """The prediction that is right there: the noise, the clean sample, or a velocity."""
        return mixed(clean, self.of_clean[t], noise, self.of_noise[t])


def mixed(
    clean: Float[Tensor, "batch *rest"], a: Float[Tensor, "batch"], noise: Float[Tensor, "batch *rest"], b: Tensor
) -> Float[Tensor, "batch *rest"]:
    """A clean + b noise, with a and b of each row."""
    a, b = (factor.to(clean).reshape(-1, *(1,) * (clean.dim() - 1)) for factor in (a, b))
    return (a * clean).addcmul(b, noise)


def draw_timesteps(drawn: Drawn, count: int, rows: int, generator: torch.Generator) -> Int[Tensor, "rows"]:
    """Places of random timesteps in a list of `count`."""
    if drawn == "uniform":
        return torch.randint(count, (rows,), generator=generator)
    shares = torch.randn(rows, generator=generator).sigmoid()
    return (shares * count).long().clamp(max=count - 1)
