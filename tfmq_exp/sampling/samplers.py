"""Samplers: DDIM (arXiv 2010.02502), with PTQD's variance too, PLMS (PNDM, arXiv 2202.09778), DPM-Solver++ (arXiv 2211.01095).

A new one stands in `SAMPLERS` of `sampling/recipe.py` as well, by which artefacts name it.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from tfmq_exp.core.validate import ANY_COUNT, COUNT, SHARE, SWITCH, Kind, check_fields, optional, whole
from tfmq_exp.sampling.trajectory import (
    Moves,
    Spacing,
    alphas_cumprod,
    require_betas,
    require_noise_prediction,
    visited,
)

ORDER = Kind("1, 2 or 3", lambda value: whole(value) and 1 <= value <= 3)
NO_ETA = Kind("0, as this sampler is deterministic", lambda value: value == 0)
Alphas = Sequence[tuple[Tensor, Tensor]]  # alpha-bar of every call, and of the one after it


@dataclass(frozen=True)
class DDIM:
    """DDIM; DDPM with all timesteps and eta = 1."""

    num_inference_steps: int | None  # network calls that are asked for (see `visited`); None for all training timesteps
    eta: float = 0.0  # 0 deterministic, 1 the variance of DDPM
    timestep_spacing: Spacing = "uniform"  # see `visited`
    steps_offset: int = 1  # see `visited`; LDM adds 1, DDIM's own program 0
    # alpha-bar after the last step is 1 (DDIM's own program), not that of timestep 0 (LDM)
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=optional(COUNT), eta=SHARE, steps_offset=ANY_COUNT)
        check_fields(self, set_alpha_to_one=SWITCH)

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        count = int(schedule["num_train_timesteps"])
        steps = count if self.num_inference_steps is None else self.num_inference_steps
        return visited(steps, count, self.timestep_spacing, self.steps_offset)

    def alphas(self, schedule: Mapping[str, Any]) -> Alphas:
        """Alpha-bar before and after each step, in double precision."""
        require_noise_prediction(schedule, "DDIM")
        table, calls = alphas_cumprod(schedule), self.calls(schedule)
        last = torch.ones_like(table[0]) if self.set_alpha_to_one else table[0]
        return list(zip(table[list(calls)], [*table[list(calls[1:])], last], strict=True))

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        return ddim_moves(self.alphas(schedule), self.eta)


@dataclass(frozen=True)
class VarianceCalibrated:
    """DDIM that adds less noise where the prediction brings noise of its own (PTQD, arXiv 2305.10657, section 3.3).

    sigma'^2 = max(0, sigma^2 - B^2 s^2), with s the standard deviation of the prediction's noise and
    B = sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a) its factor on the way to the next x.
    """

    sampler: DDIM  # the plain one
    residual: Mapping[float | int, float]  # s by timestep
    keep_drift: bool = True  # take the deterministic part with the original sigma; the release takes sigma' there too

    @property
    def eta(self) -> float:
        return self.sampler.eta

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        return self.sampler.calls(schedule)

    def remaining(self, schedule: Mapping[str, Any]) -> list[float]:
        """Sigma' / sigma of every call."""
        shares: list[float] = []
        for t, (alpha, next_alpha) in zip(self.calls(schedule), self.sampler.alphas(schedule), strict=True):
            variance = float(ddim_sigma(alpha, next_alpha, self.eta) ** 2)
            b = float((1 - next_alpha - variance).clamp(min=0).sqrt() - (next_alpha * (1 - alpha) / alpha).sqrt())
            shares.append(max(0.0, 1 - (b * self.residual[t]) ** 2 / variance) ** 0.5 if variance > 0 else 0.0)
        return shares

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        shares = self.remaining(schedule)
        return ddim_moves(self.sampler.alphas(schedule), self.eta, shares, keep_drift=self.keep_drift)


def ddim_sigma(alpha: Tensor, next_alpha: Tensor, eta: float) -> Tensor:
    """Standard deviation of the noise that a step adds (eq. 16)."""
    return eta * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)).sqrt()


def row_noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, each row from its own generator."""
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generators]
    return torch.stack(rows).to(like.device)


def ddim_moves(alphas: Alphas, eta: float, shares: Sequence[float] | None = None, *, keep_drift: bool = True) -> Moves:
    """Moves of DDIM (eq. 12), with only a share of each step's sigma as noise, and as drift unless that is kept."""

    def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        alpha, next_alpha = (a.to(x) for a in alphas[call])
        # 1. standard deviation of the noise (eq. 16)
        whole = ddim_sigma(alpha, next_alpha, eta)
        sigma = whole if shares is None else whole * shares[call]
        # 2. predicted x_0 (eq. 9)
        clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        # 3. deterministic part of the next x (eq. 12)
        variance = (whole if keep_drift else sigma) ** 2
        drift = next_alpha.sqrt() * clean + (1 - next_alpha - variance).clamp(min=0).sqrt() * eps
        # 4. random noise
        return drift + sigma * row_noise(x, generators) if eta else drift

    return Moves(move)


@dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep, as in LDM and Stable Diffusion: one call more than steps; eta is 0.

    The second timestep is visited twice: once to look ahead for the first step, once for its own.
    """

    num_inference_steps: int
    steps_offset: int = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, steps_offset=ANY_COUNT, eta=NO_ETA)

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        found = visited(self.num_inference_steps, int(schedule["num_train_timesteps"]), "uniform", self.steps_offset)
        return (*found[:2], *found[1:])

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        alphas = alphas_cumprod(schedule)
        made = PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=self.steps_offset)
        made.set_timesteps(self.num_inference_steps)
        made.timesteps = torch.tensor(self.calls(schedule))
        made.alphas_cumprod, made.final_alpha_cumprod = alphas, alphas[0]  # in double precision
        return scheduler_moves(made)


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ of an order, with `num_inference_steps` network calls; eta is 0."""

    num_inference_steps: int
    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, order=ORDER, eta=NO_ETA)

    def scheduler(self, schedule: Mapping[str, Any]) -> Any:
        """Diffusers' scheduler with its timesteps set; ValueError for a network whose training has no betas."""
        require_betas(schedule)
        made: Any = DPMSolverMultistepScheduler(**schedule, solver_order=self.order, timestep_spacing="linspace")
        made.set_timesteps(self.num_inference_steps)
        return made

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(int(t) for t in self.scheduler(schedule).timesteps)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        return scheduler_moves(self.scheduler(schedule))


def scheduler_moves(scheduler: Any, eta: float = 0.0) -> Moves:
    """Moves of a new scheduler of diffusers, which remembers earlier predictions and its step.

    It finds its first step by the timestep, as the second of two that are equal, unless it is set to begin at the first; then it
    counts its calls.
    """
    takes, timesteps = inspect.signature(scheduler.step).parameters, scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)

    def move(call: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        options = {"generator": list(generators), "eta": eta}
        given = {name: value for name, value in options.items() if name in takes}
        return scheduler.step(prediction, timesteps[call], x, return_dict=False, **given)[0]

    def scaled(call: int, x: Tensor) -> Tensor:
        return scheduler.scale_model_input(x, timesteps[call])

    # schedulers of flow matching take the noise as it is, and the network takes x as it is
    scales, sigma = hasattr(scheduler, "scale_model_input"), float(getattr(scheduler, "init_noise_sigma", 1.0))
    return Moves(move, scaled if scales else Moves._field_defaults["input"], sigma)
