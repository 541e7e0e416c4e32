"""The sampler: which timesteps are visited, and how one leads to the next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
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


@torch.no_grad()
def trajectory(
    predict: Predict,
    sampler: DDIM,
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
        noise: Any = list(generators) if sampler.eta else None
        (x_next, *_) = scheduler.step(eps, int(t), x, eta=sampler.eta, generator=noise, return_dict=False)
        yield Step(index, int(t), x, eps, x_next)
        x = x_next


def noise_predictor(unet: torch.nn.Module) -> Predict:
    """A UNet as a function (x, t) -> noise."""
    return lambda x, t: unet(x, t).sample
