"""DPM-Solver++ (arXiv 2211.01095), multistep, as diffusers has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from tfmq_exp.kinds import COUNT, Kind, check_fields, whole
from tfmq_exp.sampling.sampler import Moves

ORDER = Kind("1, 2 or 3", lambda value: whole(value) and 1 <= value <= 3)


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++.

    Args:
        steps: network calls.
        order: of the solver, 1 to 3.
        eta: 0, DPM-Solver++ is deterministic.
    """

    steps: int
    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT, order=ORDER)
        if self.eta:
            raise ValueError(f"DPM-Solver++ is deterministic: eta must be 0, got {self.eta}")

    def scheduler(self, schedule: Mapping[str, Any]) -> Any:
        """Diffusers' scheduler with its timesteps set."""
        scheduler: Any = DPMSolverMultistepScheduler(**schedule, solver_order=self.order, timestep_spacing="linspace")
        scheduler.set_timesteps(self.steps)
        return scheduler

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(int(t) for t in self.scheduler(schedule).timesteps)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        scheduler = self.scheduler(schedule)

        def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return scheduler.step(eps, scheduler.timesteps[call], x, return_dict=False)[0]

        return Moves(move)
