"""The sampler of EDM (arXiv 2206.00364): Euler's or Heun's steps along sigma, with noise added before a step if asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from tfmq_exp.core.validate import AMOUNT, COUNT, POSITIVE, check_fields, one_of, optional
from tfmq_exp.denoisers.loading.scheduler_config import EDM as PREDICTION
from tfmq_exp.sampling.samplers import row_noise
from tfmq_exp.sampling.trajectory import Moves, exact_numbers


class Preconditioning(NamedTuple):
    """Factors of D(x; sigma) = skip x + out F(scale x; noise), with F the network (eq. 7, table 1)."""

    skip: Tensor
    out: Tensor
    scale: Tensor
    noise: Tensor  # what the network is given as its timestep

    @classmethod
    def at(cls, sigma: Tensor, sigma_data: float) -> "Preconditioning":
        """The factors at some sigmas; `noise` is float32, as the original gives it to its network."""
        total = sigma**2 + sigma_data**2
        return cls(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.float().log() / 4)


@dataclass(frozen=True)
class EDM:
    """Algorithm 2, or without its correction of each step (`euler`); Heun's method calls the network twice a step but the last.

    The first call of a step is at a sigma raised by 1 + gamma, the second at the next one (gamma is 0 without `s_churn`).

    Raises:
        ValueError: a setting that cannot be, by its name.
    """

    num_inference_steps: int
    solver: Literal["heun", "euler"] = "heun"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # standard deviation of the data, part of the network's preconditioning
    rho: float = 7.0  # how much more finely small sigmas are visited (eq. 5)
    s_churn: float = 0.0  # how much noise is added, over all steps
    s_min: float = 0.0  # at sigmas from here
    s_max: float | None = None  # up to here; None for all
    s_noise: float = 1.0  # standard deviation of the added noise

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, solver=one_of("heun", "euler"))
        check_fields(self, sigma_min=POSITIVE, sigma_max=POSITIVE, sigma_data=POSITIVE, rho=POSITIVE)
        check_fields(self, s_churn=AMOUNT, s_min=AMOUNT, s_max=optional(AMOUNT), s_noise=AMOUNT)
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"EDM.sigma_min must be at most sigma_max={self.sigma_max}, got {self.sigma_min}")

    @property
    def eta(self) -> float:
        return self.s_churn

    @cached_property
    def steps(self) -> Float64[Tensor, "steps+1"]:
        """Sigma before every step (eq. 5), and 0 at the end."""
        share = torch.arange(self.num_inference_steps, dtype=torch.float64) / max(1, self.num_inference_steps - 1)
        largest, smallest = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = (largest + share * (smallest - largest)) ** self.rho
        return torch.cat([sigmas, torch.zeros_like(sigmas[:1])])

    @cached_property
    def raised(self) -> Float64[Tensor, "steps"]:
        """Sigma at the first call of every step, after noise was added."""
        now, largest = self.steps[:-1], torch.inf if self.s_max is None else self.s_max
        gamma = min(self.s_churn / self.num_inference_steps, 2**0.5 - 1)
        return torch.where((now >= self.s_min) & (now <= largest), now * (1 + gamma), now)

    @cached_property
    def sigmas(self) -> Float64[Tensor, "calls"]:
        """Sigma at every call of the network."""
        if self.solver == "euler":
            return self.raised
        return torch.stack([self.raised, self.steps[1:]], dim=1).flatten()[:-1]

    def calls(self, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
        """Log sigma / 4 of every call, the timestep of networks under EDM's preconditioning."""
        return exact_numbers(Preconditioning.at(self.sigmas, self.sigma_data).noise)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves of one trajectory; ValueError for a network that is under no such preconditioning."""
        if (predicted := schedule.get("prediction_type", "epsilon")) != PREDICTION:
            raise ValueError(f"EDM takes networks under EDM's preconditioning, got one of prediction_type={predicted}")
        return EDMTrajectory(self).moves


class EDMTrajectory:
    """The moves of one trajectory, which remember the first slope of a step of Heun's method."""

    def __init__(self, sampler: EDM) -> None:
        self.sampler, self.factors = sampler, Preconditioning.at(sampler.sigmas, sampler.sigma_data)
        self.begun: tuple[Tensor, Tensor] | None = None  # x and slope at the start of a step that is not yet finished

    @property
    def moves(self) -> Moves:
        return Moves(self.move, self.scaled, self.sampler.sigma_max, self.first)

    def scaled(self, call: int, x: Tensor) -> Tensor:
        return x * self.factors.scale[call].to(x)

    def first(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return self.noisier(0, x, generators)

    def noisier(self, step: int, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Noise that raises sigma to that of the step's first call; drawn at every step, as the original draws it."""
        if not self.sampler.s_churn:
            return x
        added = (self.sampler.raised[step] ** 2 - self.sampler.steps[step] ** 2).clamp(min=0).sqrt()
        return x + added.to(x) * self.sampler.s_noise * row_noise(x, generators)

    def move(self, call: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        sampler, heun = self.sampler, self.sampler.solver == "heun"
        step = call // 2 if heun else call
        # 1. slope (x - D) / sigma, written so that it does not cancel
        sigma = sampler.sigmas[call]
        skip, out = ((1 - self.factors.skip[call]) / sigma).to(x), (self.factors.out[call] / sigma).to(x)
        slope = skip * x - out * prediction
        last = step == sampler.num_inference_steps - 1
        # 2. Euler's step, which Heun's method repeats with the mean of the slopes at both ends
        if self.begun is None:
            moved = x + (sampler.steps[step + 1] - sampler.raised[step]).to(x) * slope
            if heun and not last:
                self.begun = x, slope
                return moved
        else:
            begin, slope_there = self.begun
            moved = begin + (sampler.steps[step + 1] - sampler.raised[step]).to(x) * (slope_there + slope) / 2
            self.begun = None
        # 3. noise of the next step
        return moved if last else self.noisier(step + 1, moved, generators)
