"""How far sampling with a quantized network is from sampling with the float one, step by step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict, Step

STREAM = "diagnostics"
Row = dict[str, float | int]


def trajectory_error(
    predict: Predict,
    quantized: Sampling,
    denoiser: Denoiser,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Float and quantized sampling (`predict`, `quantized`) from the same noise, side by side, for every step.

    `eps_error`: error of the predicted noise on the float trajectory (what one step does); `x_error`: distance of the two
    trajectories (what has accumulated). Both are mean squared errors over the variance of the float quantity.
    """
    start: dict[str, Any] = {"seed": seed, "stream": STREAM, "indices": range(images)}
    conditions = sampling.conditions(denoiser, *start.values())
    walk = quantized.trajectory(predict, denoiser, **start)
    rows: list[Row] = []
    for step in sampling.trajectory(sampling.predictor(denoiser.unet), denoiser, **start):
        other = next(walk)
        # at the first step both are at x_T, where the quantized prediction is at hand
        on_path = other.eps if step.index == 0 else _predict(predict, step, conditions)
        rows.append(
            {
                "step": step.index,
                "t": step.t,
                "eps_error": _relative(on_path, step.eps, f"the predicted noise at step {step.index + 1}"),
                "x_error": _relative(other.x_next, step.x_next, f"the trajectory at step {step.index + 1}"),
            }
        )
        each_step(step.index)
    return rows


@torch.no_grad()
def _predict(predict: Predict, step: Step, conditions: Conditions) -> Tensor:
    return predict(step.x, torch.full((len(step.x),), step.t, device=step.x.device), conditions)


def _relative(value: Tensor, wanted: Tensor, what: str) -> float:
    return float(relative((value - wanted).square().mean(), wanted.var(), what))
