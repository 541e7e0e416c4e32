"""Collection of calibration data in one pass: every step of every trajectory, T denoiser calls for T steps.

The releases restart from fresh noise for every captured step, T(T-1)/2 calls.
"""

from collections.abc import Callable, Sequence

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling


def collect_trajectories(
    denoiser: Denoiser,
    sampling: Sampling,
    indices: range,
    *,
    seed: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> CalibrationSet:
    """All steps of the float model's trajectories `indices`, as one batch; their seeds are not those of sampled images.

    Under guidance the network sees every state twice, with and without condition, and so does the set.

    Args:
        denoiser: the float model.
        sampling: sampler, conditions and guidance.
        indices: of the trajectories.
        seed: of the run.
        each_step: called with the index of each finished step.
    """
    n = len(indices)
    conditions = sampling.conditions(denoiser, seed, Stream.CALIBRATION, indices).to(torch.device("cpu"))
    table = dict(conditions.given)
    rows = torch.arange(n) if table else torch.zeros(n, dtype=torch.long)
    if sampling.guided:  # the last row of the table is that of no condition
        table = {name: torch.cat([value, conditions.null[name]]) for name, value in table.items()}
        rows = torch.cat([rows, torch.full((n,), n)])
    repeats = len(rows) // n
    image = torch.tensor(indices).repeat(repeats)
    parts: list[CalibrationSet] = []
    predict = sampling.predictor(denoiser.unet)
    for step in sampling.trajectory(predict, denoiser, seed=seed, stream=Stream.CALIBRATION, indices=indices):
        t, index = torch.full_like(rows, step.t), torch.full_like(rows, step.index)
        parts.append(CalibrationSet(step.x.cpu().repeat(repeats, 1, 1, 1), t, index, image, table, rows))
        each_step(step.index)
    return CalibrationSet.join(parts)


def join_by_step(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Several sets as one, ordered by step and then as given."""
    whole = CalibrationSet.join(parts)
    return whole[torch.argsort(whole.step, stable=True)]
