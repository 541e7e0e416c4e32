"""Accumulation of single steps' errors along the trajectory."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.diagnostics.trajectory_error import Row, paired_steps, predict_at
from tfmq_exp.finite import relative
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict

ERRORS = ("eps_error", "own_eps_error", "eps_distance", "x_error")


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
    """Four relative errors for every network call of float and quantized sampling from the same noise.

    Args:
        predict: the quantized network's prediction.
        quantized: its sampling.
        denoiser: the float network.
        sampling: its sampling.
        images: trajectories; the first of those that `trajectory_error` compares.
        seed: of their noise.
        batch: trajectories that run together.
        each_step: called with the number of calls that are done, over all batches.

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
    for start in range(0, images, batch):
        indices = range(start, min(start + batch, images))
        for pair in paired_steps(predict, quantized, denoiser, sampling, seed=seed, indices=indices):
            exact, own = pair.exact, pair.quantized
            # at the first step both are at x_T, where the float prediction is known
            there = exact.eps if exact.index == 0 else predict_at(predict_float, own.x, exact.t, pair.conditions)
            pairs = ((pair.forced, exact.eps), (own.eps, there), (own.eps, exact.eps), (own.x_next, exact.x_next))
            sums[exact.index] += torch.stack([_sums(*values) for values in pairs])
            done += 1
            each_step(done)
    errors = _relative(sums).tolist()
    return [{"step": step, "t": t, **dict(zip(ERRORS, errors[step], strict=True))} for step, t in enumerate(calls)]


def _sums(value: Tensor, exact: Tensor) -> Float[Tensor, "4"]:
    """Sums of squared differences, of `exact`, of its squares, and the number of values."""
    a, b = value.double(), exact.double()
    count = torch.tensor(float(b.numel()), dtype=torch.float64, device=b.device)
    return torch.stack([(a - b).square().sum(), b.sum(), b.square().sum(), count]).cpu()


def _relative(sums: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any"]:
    error, total, squares, count = sums.unbind(-1)
    variance = (squares - total.square() / count) / (count - 1)
    return relative(error / count, variance, "predictions or trajectories")
