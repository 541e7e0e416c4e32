"""PLMS, the pseudo linear multistep sampler (PNDM, arXiv 2202.09778) as in LDM and Stable Diffusion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PNDMScheduler
from torch import Tensor

from tfmq_exp.kinds import ANY_COUNT, COUNT, check_fields
from tfmq_exp.sampling.sampler import Moves
from tfmq_exp.sampling.schedule import alphas_cumprod, visited


@dataclass(frozen=True)
class PLMS:
    """PLMS: one call more than steps. The second timestep is visited twice, first to look ahead for the first step.

    Args:
        steps: steps that are asked for.
        offset: see `visited`.
        eta: 0, PLMS is deterministic.
    """

    steps: int
    offset: int = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT, offset=ANY_COUNT)
        if self.eta:
            raise ValueError(f"PLMS is deterministic: eta must be 0, got {self.eta}")

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        found = visited(self.steps, int(schedule["num_train_timesteps"]), "uniform", self.offset)
        return (*found[:2], *found[1:])

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=self.offset)
        scheduler.set_timesteps(self.steps)
        scheduler.alphas_cumprod = alphas_cumprod(schedule)  # in double precision
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        calls = self.calls(schedule)
        scheduler.timesteps = torch.tensor(calls)

        def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return scheduler.step(eps, calls[call], x, return_dict=False)[0]  # type: ignore[no-any-return]

        return Moves(move)
