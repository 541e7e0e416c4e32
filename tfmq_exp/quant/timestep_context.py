"""The sampling step of every row of the batch: how the timestep reaches the quantizers."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


class TimestepContext:
    """One per quantized model: written by the model's forward, read by the scale sources.

    Args:
        timesteps: the finite set of timesteps that the sampler visits, in its order; step k is `timesteps[k]`.
            A timestep that the sampler visits twice keeps the first of its steps.
        nearest: let a timestep outside the set read the step of the nearest one, instead of raising.

    Raises:
        ValueError: an empty set, or (from `at`) a timestep outside the set.
    """

    def __init__(self, timesteps: Sequence[int], *, nearest: bool = False) -> None:
        if len(timesteps) == 0:
            raise ValueError("a TimestepContext needs at least one timestep")
        self.timesteps = tuple(int(t) for t in timesteps)
        self.nearest = nearest
        size = max(self.timesteps) + 1
        self._step_of_t = torch.full((size,), -1, dtype=torch.long)
        for step, t in reversed(list(enumerate(self.timesteps))):
            self._step_of_t[t] = step
        self._index: Int[Tensor, "batch"] | None = None
        self._t: Int[Tensor, "batch"] | None = None

    @property
    def num_steps(self) -> int:
        """Size of the finite set, counted as the sampler's steps."""
        return len(self.timesteps)

    @property
    def index(self) -> Int[Tensor, "batch"]:
        """Step of each row of the current batch, 0 .. num_steps - 1."""
        if self._index is None:
            raise RuntimeError(
                "the context is not set: call the model through QuantizedUNet, or use `with context.at(t)`"
            )
        return self._index

    @property
    def t(self) -> Int[Tensor, "batch"]:
        """Timestep of each row of the current batch, as it came: with `nearest` maybe none of the finite set."""
        if self._t is None:
            raise RuntimeError(
                "the context is not set: call the model through QuantizedUNet, or use `with context.at(t)`"
            )
        return self._t

    def step_indices(self, t: Shaped[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """Look timesteps up in the finite set."""
        t = t.long()
        if self.nearest:
            known = torch.tensor(self.timesteps, device=t.device)
            return (t[:, None] - known[None]).abs().argmin(dim=1)
        table = self._step_of_t.to(t.device)
        inside = (t >= 0) & (t < len(table))
        steps = torch.where(inside, table[t.clamp(0, len(table) - 1)], -1)
        if bool((steps < 0).any()):
            wrong = int(t[steps < 0][0])
            raise ValueError(
                f"timestep {wrong} is outside the calibrated finite set of {len(set(self.timesteps))} timesteps "
                f"({min(self.timesteps)} .. {max(self.timesteps)}): sample with the calibrated steps or calibrate these"
            )
        return steps

    @contextmanager
    def at(self, t: Shaped[Tensor, "batch"]) -> Generator[None]:
        """Set the timesteps of the batch for the duration of a forward pass."""
        before = self._index, self._t
        self._index, self._t = self.step_indices(t), t.long()
        try:
            yield
        finally:
            self._index, self._t = before
