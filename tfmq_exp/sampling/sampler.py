"""The sampler: which timesteps are visited, and how one leads to the next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """One denoising step: `x` at timestep `t` and what the network predicted there; `x_next` is where it led."""

    index: int
    t: int
    x: Float[Tensor, "batch ..."]
    eps: Float[Tensor, "batch ..."]
    x_next: Float[Tensor, "batch ..."]


class Sampler(Protocol):
    """Which timesteps are visited, and how one leads to the next."""

    @property
    def steps(self) -> int:
        """Denoiser calls for one image."""
        ...

    @property
    def eta(self) -> float:
        """How much noise a step adds, against that of DDPM; 0 for deterministic samplers."""
        ...

    def scheduler(self, schedule: Mapping[str, Any]) -> DDIMScheduler:
        """Diffusers' scheduler with its timesteps set."""
        ...

    def timesteps(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The finite set, in the order of sampling."""
        ...

    def step(
        self, scheduler: DDIMScheduler, index: int, eps: Tensor, x: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """From `x` at step `index` to the next."""
        ...


@dataclass(frozen=True)
class DDIM:
    """DDIM (arXiv 2010.02502) with LDM's uniform timesteps: t = 1 + k * (1000 / steps), from the largest down.

    Args:
        steps: denoiser calls; must divide the number of training timesteps (LDM's own code silently runs another number).
        eta: 0 deterministic, 1 the variance of DDPM.
    """

    steps: int
    eta: float = 0.0

    def scheduler(self, schedule: Mapping[str, Any]) -> DDIMScheduler:
        """Diffusers' scheduler for a noise schedule, with its timesteps set.

        Raises:
            ValueError: a number of steps that does not divide the training timesteps.
        """
        train = int(schedule["num_train_timesteps"])
        if not 1 <= self.steps < train or train % self.steps:
            near = sorted((d for d in range(1, train) if train % d == 0), key=lambda d: abs(d - self.steps))[:3]
            raise ValueError(
                f"{self.steps} sampler steps do not divide {train} training timesteps; nearest that do: "
                f"{', '.join(map(str, sorted(near)))}"
            )
        scheduler = DDIMScheduler(
            **schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        )
        scheduler.set_timesteps(self.steps)
        return scheduler

    def timesteps(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The finite set, in the order of sampling."""
        return tuple(int(t) for t in self.scheduler(schedule).timesteps)

    def step(
        self,
        scheduler: DDIMScheduler,
        index: int,
        eps: Float[Tensor, "batch ..."],
        x: Float[Tensor, "batch ..."],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch ..."]:
        """From `x` at step `index` to the next; noise, if any, from each row's own generator."""
        noise: Any = list(generators) if self.eta else None
        t = int(scheduler.timesteps[index])
        return scheduler.step(eps, t, x, eta=self.eta, generator=noise, return_dict=False)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class VarianceCalibrated:
    """DDIM that adds less noise where the prediction brings noise of its own (PTQD, arXiv 2305.10657, section 3.3).

    sigma'^2 = max(0, sigma^2 - B^2 s^2), with s the standard deviation of the prediction's noise and
    B = sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a) what it is multiplied with on the way to the next x.

    Args:
        sampler: the plain one.
        residual: s for every step.
        keep_drift: take the deterministic part with the original sigma; the release takes sigma' there too.
    """

    sampler: Sampler
    residual: tuple[float, ...]
    keep_drift: bool = True

    @property
    def steps(self) -> int:
        """Denoiser calls for one image."""
        return self.sampler.steps

    @property
    def eta(self) -> float:
        """That of the plain sampler."""
        return self.sampler.eta

    def scheduler(self, schedule: Mapping[str, Any]) -> DDIMScheduler:
        """The plain sampler's."""
        return self.sampler.scheduler(schedule)

    def timesteps(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The plain sampler's."""
        return self.sampler.timesteps(schedule)

    def remaining(self, scheduler: DDIMScheduler, index: int) -> float:
        """Sigma' as a share of sigma."""
        t, jump = int(scheduler.timesteps[index]), scheduler.config["num_train_timesteps"] // self.steps
        alpha = float(scheduler.alphas_cumprod[t])
        following = float(scheduler.alphas_cumprod[t - jump] if t >= jump else scheduler.final_alpha_cumprod)
        variance = self.eta**2 * (1 - following) / (1 - alpha) * (1 - alpha / following)
        if variance <= 0:
            return 0.0
        b = (1 - following - variance) ** 0.5 - (following * (1 - alpha) / alpha) ** 0.5
        return max(0.0, 1 - (b * self.residual[index]) ** 2 / variance) ** 0.5

    def step(
        self,
        scheduler: DDIMScheduler,
        index: int,
        eps: Float[Tensor, "batch ..."],
        x: Float[Tensor, "batch ..."],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch ..."]:
        """From `x` at step `index` to the next."""
        t, share, each = int(scheduler.timesteps[index]), self.remaining(scheduler, index), list(generators)
        noise = randn_tensor(tuple(eps.shape), generator=each, device=eps.device, dtype=eps.dtype)
        eta = self.eta if self.keep_drift else self.eta * share
        noise = noise * share if self.keep_drift else noise
        return scheduler.step(eps, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def trajectory(
    predict: Predict,
    sampler: Sampler,
    schedule: Mapping[str, Any],
    x: Float[Tensor, "batch ..."],
    generators: Sequence[torch.Generator],
) -> Iterator[Step]:
    """The only sampling loop: denoise `x` step by step.

    Args:
        predict: (x, t) -> noise, with t of shape [batch].
        sampler: which steps.
        schedule: the noise that the network was trained on.
        x: where to start, pure noise.
        generators: one per row, for samplers that add noise.
    """
    scheduler = sampler.scheduler(schedule)
    for index, t in enumerate(scheduler.timesteps):
        eps = predict(x, t.expand(len(x)).to(x.device))
        x_next = sampler.step(scheduler, index, eps, x, generators)
        yield Step(index, int(t), x, eps, x_next)
        x = x_next


def noise_predictor(unet: torch.nn.Module) -> Predict:
    """A UNet as a function (x, t) -> noise."""
    return lambda x, t: unet(x, t).sample
