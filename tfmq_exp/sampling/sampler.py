"""The sampler: which timesteps are visited, and how one leads to the next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.validate import ANY_COUNT, COUNT, SHARE, SWITCH, Kind, check_fields, optional, whole
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.sampling.schedule import Spacing, alphas_cumprod, require_noise_prediction, visited

ORDER = Kind("1, 2 or 3", lambda value: whole(value) and 1 <= value <= 3)

Predict = Callable[[Tensor, Tensor, Conditions], Tensor]  # (x, t of every row, conditions) -> noise
Move = Callable[[int, Tensor, Tensor, Sequence[torch.Generator]], Tensor]  # (call, eps, x, generators) -> next x


def unscaled(call: int, x: Tensor) -> Tensor:
    """What the network is given: x itself."""
    return x


class Moves(NamedTuple):
    """How a sampler walks along one trajectory.

    Args:
        move: from one x to the next.
        input: (call, x) -> what the network is given, which some samplers scale.
        sigma: standard deviation of the noise that the trajectory starts from.
    """

    move: Move
    input: Callable[[int, Tensor], Tensor] = unscaled
    sigma: float = 1.0


class Step(NamedTuple):
    """One denoising step: the network's input `x` at timestep `t` and what it predicted; `x_next` is where that led."""

    index: int
    t: int
    x: Float[Tensor, "batch ..."]
    eps: Float[Tensor, "batch ..."]
    x_next: Float[Tensor, "batch ..."]


class Sampler(Protocol):
    """Which timesteps the network is called at, and how its prediction leads on."""

    @property
    def eta(self) -> float:
        """How much noise a step adds, against that of DDPM; 0 for deterministic samplers."""
        ...

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The timestep of every call of the network, in order; some samplers call twice at the same."""
        ...

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """A trajectory's moves. They may remember predictions, so every trajectory has its own."""
        ...


def finite_set(sampler: Sampler, schedule: Mapping[str, Any]) -> tuple[int, ...]:
    """The distinct timesteps, in the order in which they are first visited."""
    return tuple(dict.fromkeys(sampler.calls(schedule)))


def row_noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, each row from its own generator."""
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generators]
    return torch.stack(rows).to(like.device)


def ddim_sigma(alpha: Tensor, following: Tensor, eta: float) -> Tensor:
    """Standard deviation of the noise that a step adds: DDIM, arXiv 2010.02502, eq. 16."""
    return eta * ((1 - following) / (1 - alpha) * (1 - alpha / following)).sqrt()


def ddim_drift(x: Tensor, eps: Tensor, alpha: Tensor, following: Tensor, sigma: Tensor) -> Tensor:
    """The deterministic part of a step: eq. 12 without its last term."""
    clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    return following.sqrt() * clean + (1 - following - sigma**2).clamp(min=0).sqrt() * eps


def ddim_moves(
    alphas: Sequence[tuple[Tensor, Tensor]], eta: float, shares: Sequence[float], *, keep_drift: bool
) -> Move:
    """DDIM's moves, with only a share of each step's noise; without `keep_drift` the rest of the step knows of that."""

    def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        alpha, following = (a.to(x) for a in alphas[call])
        sigma = ddim_sigma(alpha, following, eta)
        less = sigma * shares[call]
        moved = ddim_drift(x, eps, alpha, following, sigma if keep_drift else less)
        return moved + less * row_noise(x, generators) if eta else moved

    return move


@dataclass(frozen=True)
class DDIM:
    """DDIM (arXiv 2010.02502).

    Args:
        steps: network calls that are asked for; how many they become is `calls`' to say. None: all training timesteps.
        eta: 0 deterministic, 1 the variance of DDPM.
        spacing, offset: see `visited`; LDM adds 1, DDIM's own program 0.
        ends_clean: alpha-bar after the last step is 1 (DDIM's own program), not that of timestep 0 (LDM).
    """

    steps: int | None
    eta: float = 0.0
    spacing: Spacing = "uniform"
    offset: int = 1
    ends_clean: bool = False

    def __post_init__(self) -> None:
        check_fields(self, steps=optional(COUNT), eta=SHARE, offset=ANY_COUNT, ends_clean=SWITCH)

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """One at every visited timestep."""
        count = int(schedule["num_train_timesteps"])
        return visited(count if self.steps is None else self.steps, count, self.spacing, self.offset)

    def alphas(self, schedule: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Alpha-bar of every call and of what follows it, in double precision."""
        require_noise_prediction(schedule, "DDIM")
        table, calls = alphas_cumprod(schedule), self.calls(schedule)
        last = torch.ones_like(table[0]) if self.ends_clean else table[0]
        return list(zip(table[list(calls)], [*table[list(calls[1:])], last], strict=True))

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves that remember nothing."""
        pairs = self.alphas(schedule)
        return Moves(ddim_moves(pairs, self.eta, [1.0] * len(pairs), keep_drift=True))


@dataclass(frozen=True)
class VarianceCalibrated:
    """DDIM that adds less noise where the prediction brings noise of its own (PTQD, arXiv 2305.10657, section 3.3).

    sigma'^2 = max(0, sigma^2 - B^2 s^2), with s the standard deviation of the prediction's noise and
    B = sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a) what it is multiplied with on the way to the next x.

    Args:
        sampler: the plain one.
        residual: s by timestep.
        keep_drift: take the deterministic part with the original sigma; the release takes sigma' there too.
    """

    sampler: DDIM
    residual: Mapping[int, float]
    keep_drift: bool = True

    @property
    def eta(self) -> float:
        """That of the plain sampler."""
        return self.sampler.eta

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """Those of the plain sampler."""
        return self.sampler.calls(schedule)

    def remaining(self, schedule: Mapping[str, Any]) -> list[float]:
        """Sigma' as a share of sigma, for every call."""
        shares: list[float] = []
        for t, (alpha, following) in zip(self.calls(schedule), self.sampler.alphas(schedule), strict=True):
            variance = float(ddim_sigma(alpha, following, self.eta) ** 2)
            b = float((1 - following - variance).clamp(min=0).sqrt() - (following * (1 - alpha) / alpha).sqrt())
            shares.append(max(0.0, 1 - (b * self.residual[t]) ** 2 / variance) ** 0.5 if variance > 0 else 0.0)
        return shares

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves that remember nothing."""
        alphas, remaining = self.sampler.alphas(schedule), self.remaining(schedule)
        return Moves(ddim_moves(alphas, self.eta, remaining, keep_drift=self.keep_drift))


@dataclass(frozen=True)
class PLMS:
    """Pseudo linear multistep (PNDM, arXiv 2202.09778) as in LDM and Stable Diffusion: one call more than steps.

    The second timestep is visited twice: once to look ahead for the first step, once for its own.
    """

    steps: int
    offset: int = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT, offset=ANY_COUNT)
        if self.eta:
            raise ValueError(f"PLMS is deterministic: eta must be 0, got {self.eta}")

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The visited timesteps, the second one twice."""
        found = visited(self.steps, int(schedule["num_train_timesteps"]), "uniform", self.offset)
        return (*found[:2], *found[1:])

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves that remember the last predictions."""
        alphas = alphas_cumprod(schedule)
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=self.offset)
        scheduler.set_timesteps(self.steps)
        scheduler.alphas_cumprod = alphas
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        calls = self.calls(schedule)
        scheduler.timesteps = torch.tensor(calls)

        def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return scheduler.step(eps, calls[call], x, return_dict=False)[0]  # type: ignore[no-any-return]

        return Moves(move)


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ (arXiv 2211.01095), multistep, as diffusers has it."""

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
        """One at every timestep that diffusers chooses."""
        return tuple(int(t) for t in self.scheduler(schedule).timesteps)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves that remember the last predictions."""
        scheduler = self.scheduler(schedule)

        def move(call: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return scheduler.step(eps, scheduler.timesteps[call], x, return_dict=False)[0]

        return Moves(move)


@torch.no_grad()
def trajectory(
    predict: Predict,
    sampler: Sampler,
    schedule: Mapping[str, Any],
    x: Float[Tensor, "batch ..."],
    generators: Sequence[torch.Generator],
    conditions: Conditions,
) -> Iterator[Step]:
    """The only sampling loop: denoise `x` call by call.

    Args:
        predict: (x, t, conditions) -> noise, with t of shape [batch].
        sampler: which steps.
        schedule: the noise that the network was trained on.
        x: where to start: standard normal noise.
        generators: one per row, for samplers that add noise.
        conditions: what the rows are conditioned on.

    Raises:
        NotFiniteError: what the network returns, or what the sampler makes of it, is NaN or infinite; names the step.
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
