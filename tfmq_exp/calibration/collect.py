"""Collect calibration data in one pass: every step of every trajectory, T denoiser calls for T steps.

The releases restart from fresh noise for every captured step, T(T-1)/2 calls.
"""

from collections.abc import Callable

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.sampler import Sampler, noise_predictor, trajectory
from tfmq_exp.sampling.seeds import image_generators, initial_noise

STREAM = "calibration"


def collect(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    images: int,
    seed: int,
    batch: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> CalibrationSet:
    """All steps of `images` trajectories of the float model, ordered by step. Seeds are apart from the evaluation's."""
    device = next(denoiser.unet.parameters()).device
    parts = []
    for start in range(0, images, batch):
        indices = range(start, min(start + batch, images))
        generators = image_generators(seed, STREAM, indices)
        x = initial_noise(generators, denoiser.sample_shape, device)
        for step in trajectory(noise_predictor(denoiser.unet), sampler, denoiser.schedule, x, generators):
            n = len(indices)
            parts.append(
                CalibrationSet(
                    step.x.cpu(), torch.full((n,), step.t), torch.full((n,), step.index), torch.tensor(list(indices))
                )
            )
            each_step(step.index)
    whole = CalibrationSet.join(parts)
    return whole[torch.argsort(whole.step, stable=True)]
