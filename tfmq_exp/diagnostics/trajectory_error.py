"""Errors of sampling with a quantized network against sampling with the float one, and how they accumulate over the steps."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import relative
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict, Step

ERRORS = ("eps_error", "own_eps_error", "eps_distance", "x_error")
Row = dict[str, Any]


class StepPair(NamedTuple):
    """A sampling step of the float and of the quantized trajectory, which start from the same noise."""

    exact: Step
    quantized: Step
    forced: Tensor  # the quantized network's prediction on the float trajectory (teacher forcing)
    conditions: Conditions


def paired_steps(
    predict: Predict, quantized: Sampling, denoiser: Denoiser, sampling: Sampling, *, seed: int, indices: Sequence[int]
) -> Iterator[StepPair]:
    """Sample images with both networks, step by step from the same noise.

    Args:
        predict: the quantized network's prediction.
        quantized: its sampling.
        denoiser: the float network.
        sampling: its sampling.
        seed: of the noise.
        indices: of the images, which run as one batch.
    """
    start: dict[str, Any] = {"seed": seed, "stream": Stream.DIAGNOSTICS, "indices": indices}
    conditions = sampling.conditions(denoiser, *start.values())
    quantized_steps = quantized.trajectory(predict, denoiser, **start)
    for exact in sampling.trajectory(sampling.predictor(denoiser.unet), denoiser, **start):
        other = next(quantized_steps)
        # at the first step both are at x_T, where the quantized prediction is known
        forced = other.eps if exact.index == 0 else _predict_at(predict, exact.x, exact.t, conditions)
        yield StepPair(exact, other, forced, conditions)


@torch.no_grad()
def _predict_at(predict: Predict, x: Tensor, t: int, conditions: Conditions) -> Tensor:
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
    """Two relative errors of every step: mean squared errors over the variance of the float quantity.

    `eps_error`: of the predicted noise on the float trajectory (what one step does); `x_error`: distance of the two
    trajectories (what has accumulated).

    Args:
        predict: the quantized network's prediction.
        quantized: its sampling.
        denoiser: the float network.
        sampling: its sampling.
        images: trajectories, in one batch.
        seed: of their noise.
        each_step: called after each step with its index, from 0.
    """
    rows: list[Row] = []
    for exact, other, forced, _ in paired_steps(
        predict, quantized, denoiser, sampling, seed=seed, indices=range(images)
    ):
        eps_error = _relative(forced, exact.eps, f"the predicted noise at step {exact.index + 1}")
        x_error = _relative(other.x_next, exact.x_next, f"the trajectory at step {exact.index + 1}")
        rows.append({"step": exact.index, "t": exact.t, "eps_error": eps_error, "x_error": x_error})
        each_step(exact.index)
    return rows


def _relative(value: Tensor, exact: Tensor, what: str) -> float:
    return float(relative((value - exact).square().mean(), exact.var(), what))


def error_accumulation(
    predict: Predict,
    quantized: Sampling,
    denoiser: Denoiser,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    batch: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Four relative errors of every step, in double precision over batches of images.

    Args:
        predict: the quantized network's prediction.
        quantized: its sampling.
        denoiser: the float network.
        sampling: its sampling.
        images: trajectories; the first of those that `trajectory_error` compares.
        seed: of their noise.
        batch: trajectories that run together.
        each_step: called with the number of steps that are done, over all batches.

    Returns:
        rows of mean squared errors over the variance of the float quantity. `eps_error`: the prediction on the float
        trajectory (teacher forcing); `own_eps_error`: on the quantized trajectory, against the float network's prediction
        there; `eps_distance`: between the predictions on the two trajectories, which is the last plus what has
        accumulated; `x_error`: between the trajectories after the step.
    """
    calls = sampling.calls(denoiser)
    sums = torch.zeros(len(calls), len(ERRORS), 4, dtype=torch.float64)
    predict_float = sampling.predictor(denoiser.unet)
    done = 0
    for indices in batches(images, batch):
        for exact, own, forced, conditions in paired_steps(
            predict, quantized, denoiser, sampling, seed=seed, indices=indices
        ):
            # at the first step both are at x_T, where the float prediction is known
            there = exact.eps if exact.index == 0 else _predict_at(predict_float, own.x, exact.t, conditions)
            pairs = ((forced, exact.eps), (own.eps, there), (own.eps, exact.eps), (own.x_next, exact.x_next))
            sums[exact.index] += torch.stack([_sums(*values) for values in pairs])
            done += 1
            each_step(done)
    error, total, squares, count = sums.unbind(-1)
    variance = (squares - total.square() / count) / (count - 1)
    errors = relative(error / count, variance, "predictions or trajectories").tolist()
    return [{"step": step, "t": t, **dict(zip(ERRORS, errors[step], strict=True))} for step, t in enumerate(calls)]


def _sums(value: Tensor, exact: Tensor) -> Float[Tensor, "4"]:
    """Sums of squared differences, of `exact`, of its squares, and the number of values."""
    a, b = value.double(), exact.double()
    count = torch.tensor(float(b.numel()), dtype=torch.float64, device=b.device)
    return torch.stack([(a - b).square().sum(), b.sum(), b.square().sum(), count]).cpu()
