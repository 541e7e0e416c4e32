"""The sampling loop, and the protocol of the samplers that it takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.denoisers.denoiser import Conditions

Predict = Callable[[Tensor, Tensor, Conditions], Tensor]  # (x, t of every row, conditions) -> noise
Move = Callable[[int, Tensor, Tensor, Sequence[torch.Generator]], Tensor]  # (call, eps, x, generators) -> next x


class Moves(NamedTuple):
    """Update rule of a sampler for one trajectory."""

    move: Move  # from one x to the next
    # (call, x) -> the network's input, which some samplers scale
    input: Callable[[int, Tensor], Tensor] = lambda call, x: x
    sigma: float = 1.0  # standard deviation of the noise that the trajectory starts from


class Step(NamedTuple):
    """One denoising step: the network's input `x` at timestep `t`, its prediction, and the next x."""

    index: int
    t: int
    x: Float[Tensor, "batch ..."]
    eps: Float[Tensor, "batch ..."]
    x_next: Float[Tensor, "batch ..."]


class Sampler(Protocol):
    """Timesteps at which the network is called, and how its predictions lead from x to x."""

    @property
    def eta(self) -> float:
        """Noise that a step adds, relative to DDPM; 0 for deterministic samplers."""
        ...

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The timestep of every call of the network, in order; some samplers call twice at the same."""
        ...

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves of one trajectory; they may remember its predictions."""
        ...


def finite_set(sampler: Sampler, schedule: Mapping[str, Any]) -> tuple[int, ...]:
    """The distinct timesteps, in the order in which they are first visited."""
    return tuple(dict.fromkeys(sampler.calls(schedule)))


@torch.no_grad()
def trajectory(
    predict: Predict,
    sampler: Sampler,
    schedule: Mapping[str, Any],
    x: Float[Tensor, "batch ..."],
    generators: Sequence[torch.Generator],
    conditions: Conditions,
) -> Iterator[Step]:
    """Denoise `x` call by call; the only sampling loop.

    Args:
        predict: (x, t, conditions) -> noise, with t of shape [batch].
        sampler: timesteps and moves.
        schedule: noise schedule of the network's training.
        x: standard normal noise.
        generators: one per row, for samplers that add noise.
        conditions: of the rows.

    Raises:
        NotFiniteError: the network's output, or what the sampler makes of it, is NaN or infinite; names the step.
    """
    moves = sampler.start(schedule)
    x = x * moves.sigma
    for index, t in enumerate(sampler.calls(schedule)):
        given = moves.input(index, x)
        eps = predict(given, torch.full((len(x),), t, device=x.device), conditions)
        require_finite(eps, f"the network's output at step {index + 1}, timestep {t}")
        x = moves.move(index, eps, x, generators)
        require_finite(x, f"what the sampler makes of the network's output at step {index + 1}, timestep {t}")
        yield Step(index, t, given, eps, x)
