"""Conventions of networks: what a pipeline makes of a scheduler's timestep before its network gets it, and the prediction's sign."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tfmq_exp.core.validate import SWITCH, check_fields, number
from tfmq_exp.sampling.trajectory import Moves, Sampler, exact_numbers

Operation = tuple[Literal["cast", "multiply", "divide", "subtract_from"], str | float]
CASTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARITHMETIC = {
    "multiply": lambda t, value: t * value,
    "divide": lambda t, value: t / value,
    "subtract_from": lambda t, value: value - t,
}


@dataclass(frozen=True)
class NetworkConvention:
    """The operations of a pipeline on the scheduler's timestep, in its order, and whether its network predicts the negative.

    FLUX in bfloat16: `(("cast", "bfloat16"), ("divide", 1000.0))`. Lumina 2: `(("divide", 1000.0), ("subtract_from", 1.0))`,
    negated. Sana: `(("multiply", scale),)`. None: the network is given what the scheduler has.

    Raises:
        ValueError: an unknown operation, a dtype that is none of `CASTS`, or a number that is not finite.
    """

    operations: tuple[Operation, ...] = ()
    negated: bool = False

    def __post_init__(self) -> None:
        check_fields(self, negated=SWITCH)
        for operation in self.operations:
            check_operation(operation)
        object.__setattr__(self, "operations", tuple(map(tuple, self.operations)))

    def __call__(self, t: float | int) -> float | int:
        """The network's timestep for one of the scheduler.

        Computed by torch in the dtype that the pipeline has at each operation, on the CPU: from int64, or float32; a product or
        quotient of whole numbers is float32.

        Raises:
            ValueError: the result is not finite.
        """
        value: Any = torch.tensor(t, dtype=torch.float32 if isinstance(t, float) else torch.int64)
        for name, by in self.operations:
            value = value.to(CASTS[str(by)]) if name == "cast" else ARITHMETIC[name](value, by)
        (found,) = exact_numbers(value[None])
        if not math.isfinite(found):
            raise ValueError(f"{self.operations} make {found} of timestep {t}")
        return found


def check_operation(operation: Any) -> None:
    """ValueError unless this is an operation of a `NetworkConvention`."""
    name, by = operation if isinstance(operation, list | tuple) and len(operation) == 2 else (operation, None)
    if name == "cast" and by in tuple(CASTS):
        return
    if isinstance(name, str) and name in ARITHMETIC and number(by) and (by or name != "divide"):
        return
    right = f"cast with {', '.join(CASTS)}, or {', '.join(ARITHMETIC)} with a finite number (no division by 0)"
    raise ValueError(f"an operation must be {right}, got {operation!r:.80}")


@dataclass(frozen=True)
class PipelineSampler:
    """A sampler as a pipeline uses it for a network with a convention of its own: its timesteps are those of the network."""

    sampler: Sampler
    convention: NetworkConvention

    def __post_init__(self) -> None:
        if isinstance(self.sampler, PipelineSampler):
            raise ValueError("a PipelineSampler holds a sampler of the network's training, no other PipelineSampler")

    @property
    def eta(self) -> float:
        return self.sampler.eta

    def calls(self, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
        """The timestep of every call as the network is given it."""
        return tuple(map(self.convention, self.sampler.calls(schedule)))

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        moves = self.sampler.start(schedule)

        def negative(call: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return moves.move(call, -prediction, x, generators)

        move = negative if self.convention.negated else moves.move
        return moves._replace(move=move, t_train=moves.t_train or self.sampler.calls(schedule))


def with_steps(sampler: Any, num_inference_steps: int) -> Sampler:
    """A sampler with another number of steps; ValueError for one without such a setting."""
    if isinstance(sampler, PipelineSampler):
        return dataclasses.replace(sampler, sampler=with_steps(sampler.sampler, num_inference_steps))
    if not hasattr(sampler, "num_inference_steps"):
        raise ValueError(f"{type(sampler).__name__} has no num_inference_steps: its number of steps is fixed")
    if isinstance(sigmas := getattr(sampler, "sigmas", None), tuple):
        if num_inference_steps == len(sigmas):
            return sampler
        raise ValueError(
            f"the pipeline gives its scheduler the sigmas of {len(sigmas)} steps, which do not tell those of "
            f"{num_inference_steps}: set protocol.sampling.num_inference_steps={num_inference_steps} for the whole run, and leave "
            "protocol.calibration.num_inference_steps (method.temporal.points) null"
        )
    return dataclasses.replace(sampler, num_inference_steps=num_inference_steps)
