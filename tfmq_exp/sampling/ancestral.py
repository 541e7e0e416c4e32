"""DDPM (arXiv 2006.11239) on some of the timesteps, with a fixed variance or the network's own (arXiv 2102.09672, 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tfmq_exp.core.validate import COUNT, check_fields, one_of
from tfmq_exp.sampling.samplers import row_noise
from tfmq_exp.sampling.trajectory import Moves, Spacing, alphas_cumprod, require_noise_prediction, visited

Variance = Literal["learned", "large"]


def chunk_variance(output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and interpolation weights (nominally -1 .. 1) in the output of a network that learned its variance.

    Raises:
        ValueError: it has not twice the sample's channels.
    """
    if output.shape[1] != 2 * sample.shape[1]:
        channels = f"{2 * sample.shape[1]} channels, got {output.shape[1]}"
        raise ValueError(f"variance=learned: the network's output must have {channels}")
    noise, weight = output.chunk(2, dim=1)
    return noise, weight


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling on respaced timesteps, as improved diffusion and DiT do it, without clipping.

    With `learned` variance the prediction is the whole output of the network: noise, then the weight v of each variance,
    exp(w log beta + (1 - w) log beta~) with w = (v + 1) / 2 (eq. 15); `large` is beta, but beta~ at the last step.
    """

    num_inference_steps: int
    variance: Variance = "learned"
    timestep_spacing: Spacing = "ends"  # see `visited`

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, variance=one_of("learned", "large"))

    @property
    def eta(self) -> float:
        return 1.0

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        return visited(self.num_inference_steps, int(schedule["num_train_timesteps"]), self.timestep_spacing, 0)

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        require_noise_prediction(schedule, "DDPM")
        alpha = alphas_cumprod(schedule)[list(self.calls(schedule))]
        before = torch.cat([alpha[1:], alpha.new_ones(1)])  # of the next call, which is less noisy
        beta = 1 - alpha / before
        posterior = beta * (1 - before) / (1 - alpha)
        # the last step's is zero: the one before stands in for its logarithm
        least = torch.cat([posterior[:-1], posterior[-2:-1]]) if len(posterior) > 1 else posterior
        most = torch.cat([beta[:-1], least[-1:]]) if self.variance == "large" else beta
        # everything in double precision first: 1 - alpha-bar is small where the noise is
        tables = torch.stack(
            [
                *((1 / alpha).sqrt(), (1 / alpha - 1).sqrt()),
                *(beta * before.sqrt() / (1 - alpha), (1 - before) * (1 - beta).sqrt() / (1 - alpha)),
                *(least.log(), most.log()),
            ],
            dim=1,
        )

        def move(call: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            of_x, of_eps, of_clean, of_present, log_least, log_most = tables[call].to(x)
            eps, log_variance = prediction, log_most
            if self.variance == "learned":
                eps, weight = chunk_variance(prediction, x)
                weight = (weight + 1) / 2
                log_variance = weight * log_most + (1 - weight) * log_least
            # 1. predicted x_0
            clean = of_x * x - of_eps * eps
            # 2. mean of the posterior (arXiv 2006.11239, eq. 7)
            mean = of_clean * clean + of_present * x
            # 3. random noise, but at the last step
            noise = row_noise(x, generators)
            return mean if call == len(tables) - 1 else mean + (log_variance / 2).exp() * noise

        return Moves(move)
