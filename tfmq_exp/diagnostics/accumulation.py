"""How the error of single steps accumulates along the trajectory."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.diagnostics.trajectory_error import STREAM
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict

ERRORS = ("eps_error", "own_eps_error", "eps_distance", "x_error")
Row = dict[str, Any]


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
    """Float and quantized sampling (`predict`, `quantized`) from the same noise, side by side, for every network call.

    Args:
        predict: the quantized network's prediction.
        quantized: how it is sampled.
        denoiser: the float network.
        sampling: how it is sampled.
        images: trajectories; the first of those that `trajectory_error` compares.
        seed: of their noise.
        batch: how many run together.
        each_step: told how many calls are done, over all batches.

    Returns:
        rows of mean squared errors over the variance of the float quantity. `eps_error`: the prediction where the float
        trajectory goes (teacher forcing); `own_eps_error`: where the quantized trajectory goes, against what the float
        network says there; `eps_distance`: between the predictions on the two trajectories, which is the last plus what has
        accumulated; `x_error`: between the trajectories after the step.
    """
    calls = sampling.calls(denoiser)
    sums = torch.zeros(len(calls), len(ERRORS), 4, dtype=torch.float64)
    done = 0
    for start in range(0, images, batch):
        where: dict[str, Any] = {
            "seed": seed,
            "stream": STREAM,
            "indices": range(start, min(start + batch, images)),
        }
        conditions = sampling.conditions(denoiser, *where.values())
        ask = sampling.predictor(denoiser.unet)
        walk = quantized.trajectory(predict, denoiser, **where)
        for step in sampling.trajectory(ask, denoiser, **where):
            own = next(walk)
            # at the first step both are at x_T, where both predictions are at hand
            forced = own.eps if step.index == 0 else _at(predict, step.x, step.t, conditions)
            there = step.eps if step.index == 0 else _at(ask, own.x, step.t, conditions)
            pairs = ((forced, step.eps), (own.eps, there), (own.eps, step.eps), (own.x_next, step.x_next))
            sums[step.index] += torch.stack([_sums(*pair) for pair in pairs])
            done += 1
            each_step(done)
    relative = _relative(sums).tolist()
    return [{"step": step, "t": t, **dict(zip(ERRORS, relative[step], strict=True))} for step, t in enumerate(calls)]


@torch.no_grad()
def _at(predict: Predict, x: Tensor, t: int, conditions: Conditions) -> Tensor:
    return predict(x, torch.full((len(x),), t, device=x.device), conditions)


def _sums(value: Tensor, wanted: Tensor) -> Float[Tensor, "4"]:
    """Of squared differences, and of what the variance of `wanted` is made of."""
    a, b = value.double(), wanted.double()
    count = torch.tensor(float(b.numel()), dtype=torch.float64, device=b.device)
    return torch.stack([(a - b).square().sum(), b.sum(), b.square().sum(), count]).cpu()


def _relative(sums: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any"]:
    error, total, squares, count = sums.unbind(-1)
    variance = (squares - total.square() / count) / (count - 1)
    return relative(error / count, variance, "predictions or trajectories")
