"""The sampling step of every row of the batch: how the timestep reaches the quantizers."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

# What a timestep outside the finite set does: raise ValueError, or read the table of the nearest one (of two as near, the noisier).
OutsideTimesteps = Literal["error", "nearest"]
Outside = OutsideTimesteps | Literal["unchecked"]  # the caller has checked before


class TimestepContext(nn.Module):
    """Timesteps of the present batch; one per quantized model, set by the model's forward and read by the scale providers.

    Args:
        timesteps: the finite set of timesteps that the sampler visits, in its order; step k is `timesteps[k]`.
            A timestep that the sampler visits twice keeps the first of its steps.

    Raises:
        ValueError: an empty set.
    """

    step_of_t: Tensor
    visited: Tensor

    def __init__(self, timesteps: Sequence[int]) -> None:
        super().__init__()
        if len(timesteps) == 0:
            raise ValueError("a TimestepContext needs at least one timestep")
        self.timesteps = tuple(int(t) for t in timesteps)
        # no step: a table of scales has no such row
        table = torch.full((max(self.timesteps) + 1,), len(self.timesteps))
        for step, t in reversed(list(enumerate(self.timesteps))):
            table[t] = step
        self.register_buffer("step_of_t", table, persistent=False)
        self.register_buffer("visited", torch.tensor(self.timesteps), persistent=False)
        self._t: Int[Tensor, "batch"] | None = None
        self._index: Int[Tensor, "batch"] | None = None
        self.scales: Mapping[Any, Float[Tensor, "batch"]] = {}  # of TDQ scales evaluated for this batch

    @property
    def num_steps(self) -> int:
        """Size of the finite set, counted as the sampler's steps."""
        return len(self.timesteps)

    @property
    def index(self) -> Int[Tensor, "batch"]:
        """Step of each row of the present batch, 0 .. num_steps - 1."""
        return self._set(self._index)

    @property
    def t(self) -> Int[Tensor, "batch"]:
        """Timestep of each row of the present batch, as it came: with `nearest` maybe none of the finite set."""
        return self._set(self._t)

    def _set(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise RuntimeError(
                "the context is not set: call the model through QuantizedUNet, or use `with context.at(t)`"
            )
        return value

    def require(self, timesteps: Sequence[int]) -> None:
        """Raise ValueError for a timestep outside the finite set."""
        known = set(self.timesteps)
        if wrong := [t for t in timesteps if t not in known]:
            raise ValueError(
                f"timestep {wrong[0]} is outside the calibrated finite set of {len(known)} timesteps "
                f"({min(self.timesteps)} .. {max(self.timesteps)}): sample with the calibrated steps, calibrate these, or let "
                "it read the nearest one (outside_timesteps=nearest)"
            )

    def step_indices(self, t: Shaped[Tensor, "batch"], outside: Outside = "error") -> Int[Tensor, "batch"]:
        """Step of each timestep. `error` waits for the device of `t`; the other choices do not."""
        given, t = t, t.long()
        match outside:
            case "nearest":  # larger timesteps come first in the set, and argmin takes the first of equals
                return (t[:, None] - self.visited.to(t.device)).abs().argmin(dim=1)
            case "error":
                self.require(given.tolist())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            case "unchecked":
                pass
            case _:
                raise ValueError(f"outside must be error, nearest or unchecked, got {outside!r}")
        return self.step_of_t.to(t.device)[t]

    @contextmanager
    def at(
        self, t: Shaped[Tensor, "batch"], outside: Outside = "error", scales: Mapping[Any, Tensor] | None = None
    ) -> Generator[None]:
        """Set the timesteps of the batch for the duration of a forward pass, and the TDQ scales evaluated for it."""
        before = self._index, self._t, self.scales
        self._index, self._t, self.scales = self.step_indices(t, outside), t.long(), scales or {}
        try:
            yield
        finally:
            self._index, self._t, self.scales = before
