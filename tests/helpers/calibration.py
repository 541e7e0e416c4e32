"""Calibration sets: of random inputs, and of a denoiser's trajectories."""

from collections.abc import Callable

import torch
from torch import nn

from tests.conftest import TIMESTEPS, example_inputs
from tfmq_exp.calibration.dataset import CalibrationSet, collect_trajectories
from tfmq_exp.core.batches import batches
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling


def calibration(network: nn.Module, each: int = 6, seed: int = 2) -> CalibrationSet:
    """As many random samples of each timestep, ordered by step."""
    inputs = example_inputs(network, tuple(t for t in TIMESTEPS for _ in range(each)), seed)
    steps = torch.arange(len(TIMESTEPS)).repeat_interleave(each)
    conditions = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    return CalibrationSet(inputs["sample"], inputs["timestep"], steps, torch.arange(len(steps)), conditions)


def collect(
    denoiser: Denoiser,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    batch: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> CalibrationSet:
    """All steps of `images` trajectories, as a run collects them."""
    parts = [
        collect_trajectories(denoiser, sampling, indices, seed=seed, each_step=each_step)
        for indices in batches(images, batch)
    ]
    return CalibrationSet.join(parts, by_step=True)
