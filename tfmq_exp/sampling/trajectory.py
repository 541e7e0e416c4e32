"""The sampling loop, the protocol of its samplers, noise schedules of training, and the timesteps that a sampler visits."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, repeat
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.denoisers.denoiser import Conditions

Spacing = Literal["uniform", "quadratic", "ends"]
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


def alphas_cumprod(schedule: Mapping[str, Any]) -> Float64[Tensor, "timesteps"]:
    """alpha-bar of every training timestep, in double precision as LDM computes it; ValueError for an unknown schedule.

    `linear`; `scaled_linear`, which is linear in the square root of beta (LDM's "linear"); `squaredcos_cap_v2`, the cosine of
    improved diffusion (arXiv 2102.09672, eq. 17), which has no start and end; or `trained_betas` in place of all settings.
    """
    if schedule.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr=True is not supported here, but by sampler=folder and dpm_solver")
    count, kind = int(schedule["num_train_timesteps"]), schedule["beta_schedule"]
    start, end = float(schedule["beta_start"]), float(schedule["beta_end"])
    if (trained := schedule.get("trained_betas")) is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    elif kind == "squaredcos_cap_v2":
        time = torch.arange(count + 1, dtype=torch.float64) / count
        kept = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {kind!r}")
    return (1 - betas).cumprod(0)


def require_noise_prediction(schedule: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, beginning with `name`, for a schedule whose `prediction_type` is not epsilon (the default)."""
    if (kind := schedule.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(f"{name} takes networks that predict noise; the folder's scheduler has prediction_type={kind}")


def visited(steps: int, train: int, spacing: Spacing, offset: int) -> tuple[int, ...]:
    """Timesteps of `train` in the order of sampling, from the noisiest, each with `offset` added (1 in LDM, 0 in DDIM).

    `uniform`: 0, c, 2c, ... below `train` with c = train // steps, which are more than `steps` where `steps` does not divide
    `train` (400 of 1000 become 500, as in LDM). `quadratic`: the squares of `steps` equal parts of sqrt(0.8 train), rounded
    down; some come more than once. `ends`: from the first to the last in equal parts, rounded, as improved diffusion (arXiv
    2102.09672) and DiT respace them.

    Raises:
        ValueError: no steps, more than there are timesteps, or a rule that leaves the training range.
    """
    if not 1 <= steps <= train:
        raise ValueError(f"{steps} sampler steps are not 1 to {train}")
    if spacing == "uniform":
        found = [t + offset for t in range(0, train, train // steps)]
    elif spacing == "quadratic":
        ends = torch.linspace(0, (0.8 * train) ** 0.5, steps, dtype=torch.float64).tolist()
        found = [int(root**2) + offset for root in ends]
    elif spacing == "ends":
        stride = (train - 1) / max(1, steps - 1)
        # summed as the original does, whose rounding decides halves
        found = [round(place) + offset for place in accumulate(repeat(stride, steps - 1), initial=0.0)]
    else:
        raise ValueError(f"spacing must be uniform, quadratic or ends, got {spacing!r}")
    if max(found) >= train:
        near = sorted((d for d in range(1, train) if train % d == 0), key=lambda d: abs(d - steps))[:3]
        raise ValueError(
            f"{steps} sampler steps would visit timestep {max(found)} of 0 .. {train - 1}; "
            f"numbers near it that divide {train}: {', '.join(map(str, sorted(near)))}"
        )
    return tuple(reversed(found))
