"""Error of sampling with a quantized network against sampling with the float one, step by step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.finite import relative
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict, Step

STREAM = "diagnostics"
Row = dict[str, Any]


class StepPair(NamedTuple):
    """A sampling step of the float and of the quantized trajectory, which start from the same noise.

    Args:
        exact: on the float trajectory.
        quantized: on the quantized one.
        forced: the quantized network's prediction on the float trajectory (teacher forcing).
        conditions: of the images.
    """

    exact: Step
    quantized: Step
    forced: Tensor
    conditions: Conditions


def paired_steps(
    predict: Predict, quantized: Sampling, denoiser: Denoiser, sampling: Sampling, *, seed: int, indices: Sequence[int]
) -> Iterator[StepPair]:
    """Sample with both networks side by side.

    Args:
        predict: the quantized network's prediction.
        quantized: its sampling.
        denoiser: the float network.
        sampling: its sampling.
        seed: of the noise.
        indices: of the images.
    """
    start: dict[str, Any] = {"seed": seed, "stream": STREAM, "indices": indices}
    conditions = sampling.conditions(denoiser, *start.values())
    quantized_steps = quantized.trajectory(predict, denoiser, **start)
    for exact in sampling.trajectory(sampling.predictor(denoiser.unet), denoiser, **start):
        other = next(quantized_steps)
        # at the first step both are at x_T, where the quantized prediction is known
        forced = other.eps if exact.index == 0 else predict_at(predict, exact.x, exact.t, conditions)
        yield StepPair(exact, other, forced, conditions)


@torch.no_grad()
def predict_at(predict: Predict, x: Tensor, t: int, conditions: Conditions) -> Tensor:
    """A prediction for images that are all at one timestep."""
    return predict(x, torch.full((len(x),), t, device=x.device), conditions)


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
    """Relative errors of every step: mean squared errors over the variance of the float quantity.

    `eps_error`: of the predicted noise on the float trajectory (what one step does); `x_error`: distance of the two
    trajectories (what has accumulated). Arguments are those of `paired_steps`; `each_step` is called with a step's index.
    """
    rows: list[Row] = []
    for pair in paired_steps(predict, quantized, denoiser, sampling, seed=seed, indices=range(images)):
        exact, i = pair.exact, pair.exact.index
        eps_error = _relative(pair.forced, exact.eps, f"the predicted noise at step {i + 1}")
        x_error = _relative(pair.quantized.x_next, exact.x_next, f"the trajectory at step {i + 1}")
        rows.append({"step": i, "t": exact.t, "eps_error": eps_error, "x_error": x_error})
        each_step(i)
    return rows


def _relative(value: Tensor, exact: Tensor, what: str) -> float:
    return float(relative((value - exact).square().mean(), exact.var(), what))
