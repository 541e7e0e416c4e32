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
from tfmq_exp.denoisers.loading.scheduler_config import EDM, FLOW

Spacing = Literal["uniform", "quadratic", "ends"]
# What a network predicts that predicts no noise, by diffusers' `prediction_type`; `EDM` is ours.
PREDICTED = {
    "sample": "the clean sample",
    "v_prediction": "a velocity, of noise and clean sample",
    FLOW: "a velocity, noise less clean sample",
    EDM: "a mixture of noise and clean sample that changes with sigma (arXiv 2206.00364, eq. 7)",
}
Predict = Callable[[Tensor, Tensor, Conditions], Tensor]  # (x, t of every row, conditions) -> prediction
Move = Callable[[int, Tensor, Tensor, Sequence[torch.Generator]], Tensor]  # (call, prediction, x, generators) -> next x


class Moves(NamedTuple):
    """Update rule of a sampler for one trajectory."""

    move: Move  # from one x to the next
    # (call, x) -> the network's input, which some samplers scale
    input: Callable[[int, Tensor], Tensor] = lambda call, x: x
    sigma: float = 1.0  # standard deviation of the noise that the trajectory starts from
    # (x, generators) -> x of the first call, for samplers that add noise before it
    first: Callable[[Tensor, Sequence[torch.Generator]], Tensor] = lambda x, generators: x
    # of every call in the sampler's own units, where the network is given others
    t_train: tuple[float | int, ...] | None = None


class Step(NamedTuple):
    """One denoising step: the network's input `x` at timestep `t`, its prediction, and the next x.

    A timestep is a whole number where the sampler has whole ones, else a float with the exact value of the float32 that the
    network is given. `eps` is whatever the network predicts: noise, sample or velocity.
    """

    index: int
    t: float | int
    x: Float[Tensor, "batch ..."]
    eps: Float[Tensor, "batch ..."]
    x_next: Float[Tensor, "batch ..."]
    t_train: float | int  # t in the sampler's own units, which are those of the training


class Sampler(Protocol):
    """Timesteps at which the network is called, and how its predictions lead from x to x."""

    @property
    def eta(self) -> float:
        """Noise that a step adds, relative to DDPM; 0 for deterministic samplers."""
        ...

    def calls(self, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
        """The timestep of every call as the network is given it, in order; some samplers call twice at the same."""
        ...

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves of one trajectory; they may remember its predictions."""
        ...


def finite_set(sampler: Sampler, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
    """The distinct timesteps, in the order in which they are first visited."""
    return tuple(dict.fromkeys(sampler.calls(schedule)))


def exact_numbers(t: Tensor) -> tuple[float | int, ...]:
    """Timesteps of a tensor: int64 as whole numbers, others as floats with the exact values of float32."""
    return tuple((t.float().double() if t.is_floating_point() else t).tolist())


def timestep_rows(t: float | int, rows: int, device: torch.device) -> Tensor:
    """A timestep for every row of a batch, as the network is given it: int64, or float32."""
    return torch.full((rows,), t, dtype=torch.float32 if isinstance(t, float) else torch.int64, device=device)


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
        predict: (x, t, conditions) -> prediction, with t of shape [batch], int64 or float32.
        sampler: timesteps and moves.
        schedule: noise schedule of the network's training.
        x: standard normal noise.
        generators: one per row, for samplers that add noise.
        conditions: of the rows.

    Raises:
        NotFiniteError: the network's output, or what the sampler makes of it, is NaN or infinite; names the step.
    """
    moves = sampler.start(schedule)
    calls = sampler.calls(schedule)
    x = moves.first(x * moves.sigma, generators)
    for index, (t, t_train) in enumerate(zip(calls, moves.t_train or calls, strict=True)):
        given = moves.input(index, x)
        eps = predict(given, timestep_rows(t, len(x), x.device), conditions)
        require_finite(eps, f"the network's output at step {index + 1}, timestep {t}")
        x = moves.move(index, eps, x, generators)
        require_finite(x, f"what the sampler makes of the network's output at step {index + 1}, timestep {t}")
        yield Step(index, t, given, eps, x, t_train)


def alphas_cumprod(schedule: Mapping[str, Any]) -> Float64[Tensor, "timesteps"]:
    """alpha-bar of every training timestep, in double precision as LDM computes it; ValueError for an unknown schedule.

    `linear`; `scaled_linear`, which is linear in the square root of beta (LDM's "linear"); `squaredcos_cap_v2`, the cosine of
    improved diffusion (arXiv 2102.09672, eq. 17), which has no start and end; or `trained_betas` in place of all settings.
    """
    if schedule.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr=True is not supported here, but by sampler=folder and dpm_solver")
    require_betas(schedule)
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


def require_betas(schedule: Mapping[str, Any]) -> None:
    """Raise ValueError for a network whose training has no betas: flow matching, or EDM's."""
    if "beta_schedule" not in schedule:
        predicted = f"prediction_type={schedule.get('prediction_type')}"
        raise ValueError(f"the network was trained without betas ({predicted}), which sampler=folder alone can sample")


def require_noise_prediction(schedule: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, beginning with `name`, for a schedule whose `prediction_type` is not epsilon (the default)."""
    if (kind := schedule.get("prediction_type", "epsilon")) != "epsilon":
        what = f": this one predicts {PREDICTED[kind]}" if kind in PREDICTED else ""
        raise ValueError(
            f"{name} takes networks that predict noise; the folder's scheduler has prediction_type={kind}{what}"
        )


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
