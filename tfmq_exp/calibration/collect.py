"""Collect calibration data in one pass: every step of every trajectory, T denoiser calls for T steps.

The releases restart from fresh noise for every captured step, T(T-1)/2 calls.
"""

from collections.abc import Callable, Sequence

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling

STREAM = "calibration"


def collect(
    denoiser: Denoiser,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    batch: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> CalibrationSet:
    """All steps of `images` trajectories of the float model, ordered by step. Seeds are apart from the evaluation's.

    Under guidance the network sees every state twice, with and without condition, and so does the set.
    """
    ranges = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    return ordered([follow(denoiser, sampling, indices, seed=seed, each_step=each_step) for indices in ranges])


def ordered(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Several sets as one, ordered by step and then as they came."""
    whole = CalibrationSet.join(parts)
    return whole[torch.argsort(whole.step, stable=True)]


def follow(
    denoiser: Denoiser,
    sampling: Sampling,
    indices: range,
    *,
    seed: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> CalibrationSet:
    """All steps of the trajectories `indices`, which go through the network together."""
    n = len(indices)
    predict = sampling.predictor(denoiser.unet)
    conditions = sampling.conditions(denoiser, seed, STREAM, indices).to(torch.device("cpu"))
    table = dict(conditions.given)
    rows = torch.arange(n) if table else torch.zeros(n, dtype=torch.long)
    if sampling.guided:  # the last row is that of no condition
        table = {name: torch.cat([value, conditions.null[name]]) for name, value in table.items()}
        rows = torch.cat([rows, torch.full((n,), n)])
    halves = len(rows) // n
    image = torch.tensor(indices).repeat(halves)
    parts: list[CalibrationSet] = []
    for step in sampling.trajectory(predict, denoiser, seed=seed, stream=STREAM, indices=indices):
        at = (torch.full_like(rows, step.t), torch.full_like(rows, step.index))
        parts.append(CalibrationSet(step.x.cpu().repeat(halves, 1, 1, 1), *at, image, table, rows))
        each_step(step.index)
    return CalibrationSet.join(parts)
