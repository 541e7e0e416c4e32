"""Multistep samplers of diffusers: PLMS (PNDM, arXiv 2202.09778) and DPM-Solver++ (arXiv 2211.01095)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from tfmq_exp.core.validate import ANY_COUNT, COUNT, Kind, check_fields, whole
from tfmq_exp.sampling.sampler import Moves
from tfmq_exp.sampling.schedule import alphas_cumprod, visited

ORDER = Kind("1, 2 or 3", lambda value: whole(value) and 1 <= value <= 3)


@dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep, as in LDM and Stable Diffusion: one call more than steps.

    The second timestep is visited twice: once to look ahead for the first step, once for its own.

    Args:
        num_inference_steps: steps that are asked for.
        steps_offset: see `visited`.
        eta: 0, PLMS is deterministic.
    """

    num_inference_steps: int
    steps_offset: int = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, steps_offset=ANY_COUNT)
        if self.eta:
            raise ValueError(f"PLMS is deterministic: eta must be 0, got {self.eta}")

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        found = visited(self.num_inference_steps, int(schedule["num_train_timesteps"]), "uniform", self.steps_offset)
        return (*found[:2], *found[1:])

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        alphas, calls = alphas_cumprod(schedule), self.calls(schedule)
        scheduler = PNDMScheduler(
            **schedule, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=self.steps_offset
        )
        scheduler.set_timesteps(self.num_inference_steps)
        scheduler.timesteps = torch.tensor(calls)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas, alphas[0]  # in double precision
        return scheduler_moves(scheduler, calls)


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++.

    Args:
        num_inference_steps: network calls.
        order: of the solver, 1 to 3.
        eta: 0, DPM-Solver++ is deterministic.
    """

    num_inference_steps: int
    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, order=ORDER)
        if self.eta:
            raise ValueError(f"DPM-Solver++ is deterministic: eta must be 0, got {self.eta}")

    def scheduler(self, schedule: Mapping[str, Any]) -> Any:
        """Diffusers' scheduler with its timesteps set."""
        scheduler: Any = DPMSolverMultistepScheduler(**schedule, solver_order=self.order, timestep_spacing="linspace")
        scheduler.set_timesteps(self.num_inference_steps)
        return scheduler

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(int(t) for t in self.scheduler(schedule).timesteps)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        scheduler = self.scheduler(schedule)
        return scheduler_moves(scheduler, scheduler.timesteps)


def scheduler_moves(scheduler: Any, timesteps: Sequence[Any]) -> Moves:
    """Moves of a scheduler of diffusers that remembers the last predictions."""

    def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return scheduler.step(eps, timesteps[call], x, return_dict=False)[0]

    return Moves(move)
