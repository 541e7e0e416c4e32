"""The sampling step, and the condition, of every row of the batch: how they reach quantizers and stored features."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tfmq_exp.quant.condition_set import ConditionSet

# What a timestep outside the finite set does: raise ValueError, or read the table of the nearest one (of two as near, the noisier).
OutsideTimesteps = Literal["error", "nearest"]
Outside = OutsideTimesteps | Literal["unchecked"]  # the caller has checked before
# A timestep as a scheduler gives it: a whole number, or the exact value of a real one (float32 fits into a float).
Timestep = int | float
SAME = 1e-6  # of its size, a real timestep may differ from that of the finite set: networks are given float32


def exact_timesteps(timesteps: Sequence[Timestep]) -> Shaped[Tensor, "steps"]:
    """Timesteps as int64 where all are whole numbers by type, else as float64."""
    whole = all(isinstance(t, int) for t in timesteps)
    return torch.tensor(list(timesteps), dtype=torch.int64 if whole else torch.float64)


def network_timesteps(t: Shaped[Tensor, "rows"]) -> Shaped[Tensor, "rows"]:
    """Exact timesteps as a network is given them: int64, or float32."""
    return t.float() if t.is_floating_point() else t


class TimestepContext(nn.Module):
    """Timesteps of the present batch; one per quantized model, set by the model's forward and read by the scale providers.

    Args:
        timesteps: the finite set of timesteps that the network is called at, in the sampler's order; step k is `timesteps[k]`.
            A timestep that the sampler visits twice keeps the first of its steps.

    Raises:
        ValueError: an empty set, or a timestep that is not finite.
    """

    visited: Tensor

    def __init__(self, timesteps: Sequence[Timestep]) -> None:
        super().__init__()
        if len(timesteps) == 0:
            raise ValueError("a TimestepContext needs at least one timestep")
        if wrong := [t for t in timesteps if not math.isfinite(t)]:
            raise ValueError(f"timesteps must be finite numbers, got {wrong[0]}")
        self.timesteps = tuple(t if isinstance(t, float) else int(t) for t in timesteps)
        self.register_buffer("visited", torch.tensor(self.timesteps, dtype=torch.float64), persistent=False)
        self._t: Shaped[Tensor, "batch"] | None = None
        self._index: Int[Tensor, "batch"] | None = None
        self.scales: Mapping[Any, Float[Tensor, "batch"]] = {}  # of TDQ scales evaluated for this batch
        self.conditions: ConditionSet | None = None  # by which features are stored beside the timestep
        self._condition: Int[Tensor, "batch"] | None = None

    @property
    def num_steps(self) -> int:
        """Size of the finite set, counted as the sampler's steps."""
        return len(self.timesteps)

    @property
    def index(self) -> Int[Tensor, "batch"]:
        """Step of each row of the present batch, 0 .. num_steps - 1."""
        return self._set(self._index)

    def steps_of(self, x: Shaped[Tensor, "rows ..."]) -> Int[Tensor, "rows"]:
        """Step of each row of a tensor; a sample may have several consecutive ones: its frames, words or sizes."""
        return self.index if len(x) == len(self.index) else self.index.repeat_interleave(len(x) // len(self.index))

    @property
    def t(self) -> Shaped[Tensor, "batch"]:
        """Timestep of each row of the present batch, as it came: with `nearest` maybe none of the finite set."""
        return self._set(self._t)

    @property
    def condition(self) -> Int[Tensor, "batch"]:
        """Place of each row's condition in the finite set of conditions; 0 without such a set."""
        return torch.zeros_like(self.index) if self.conditions is None else self._set(self._condition)

    def _set(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise RuntimeError(
                "the context is not set: call the model through QuantizedNetwork, or use `with context.at(t)`"
            )
        return value

    def require(self, timesteps: Sequence[Timestep]) -> None:
        """Raise ValueError for a timestep outside the finite set."""
        given = torch.tensor(list(timesteps), dtype=torch.float64)
        nearest = (given[:, None] - self.visited.cpu()).abs().amin(dim=1)
        # NaN is as far from all, and infinity as near
        if len(wrong := given[~((nearest <= SAME * given.abs()) & given.isfinite())]):
            raise ValueError(
                f"timestep {float(wrong[0]):.10g} is outside the calibrated finite set of {len(set(self.timesteps))} "
                f"timesteps ({min(self.timesteps):.10g} .. {max(self.timesteps):.10g}): sample with the calibrated steps, "
                "calibrate these, or let it read the nearest one (outside_timesteps=nearest)"
            )

    def step_indices(self, t: Shaped[Tensor, "batch"], outside: Outside = "error") -> Int[Tensor, "batch"]:
        """Step of each timestep. `error` waits for the device of `t` to look; the other choices do not."""
        # larger timesteps come first in the set, and min takes the first of equals
        distance, index = (t[:, None] - self.visited.to(t.device)).abs().min(dim=1)
        match outside:
            case "nearest":
                return index
            case "error":
                self.require(t.tolist())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            case "unchecked":
                pass
            case _:
                raise ValueError(f"outside must be error, nearest or unchecked, got {outside!r}")
        return torch.where(distance <= SAME * t.abs(), index, self.num_steps)  # no step: a table has no such row

    @contextmanager
    def at(
        self,
        t: Shaped[Tensor, "batch"],
        outside: Outside = "error",
        scales: Mapping[Any, Tensor] | None = None,
        steps: Int[Tensor, "batch"] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Generator[None]:
        """Set the timesteps of the batch for the duration of a forward pass.

        Args:
            t: timesteps of the rows.
            outside: what one outside the finite set does.
            scales: TDQ scales that were evaluated for them.
            steps: where they are known already.
            conditions: of the rows, as arguments of the network; read where there is a finite set of them.

        Raises:
            ValueError: a timestep or a condition of which there is no table.
        """
        before = self._index, self._t, self.scales, self._condition
        self._index = self.step_indices(t, outside) if steps is None else steps
        self._t, self.scales = t, scales or {}
        self._condition = None if self.conditions is None or conditions is None else self.conditions.index(conditions)
        try:
            yield
        finally:
            self._index, self._t, self.scales, self._condition = before
