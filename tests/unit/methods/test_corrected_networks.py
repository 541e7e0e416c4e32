"""Networks and timesteps that the correction of quantization noise takes, and those that it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import quantizable
from tests.helpers.sampling import SCHEDULE
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.methods.noise_correction import NoCorrection, NoiseCorrection
from tfmq_exp.methods.noise_statistics import NoiseStatistics
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM

CORRECTION = NoiseCorrection(4, "channel", "residual", "pooled", True)


@pytest.mark.bad_input
def test_a_network_whose_noise_is_not_known_is_refused_with_the_reason(
    denoiser: Denoiser, tiny_unet: nn.Module
) -> None:
    schedule = {"num_train_timesteps": 1000, "prediction_type": "edm"}
    message = r"PTQD's correction .* is of predicted noise: prediction_type=edm is not supported: the network predicts a mixture"
    with pytest.raises(ValueError, match=message):
        CORRECTION.check_training(schedule)
    other = dataclasses.replace(denoiser, schedule=schedule)
    with pytest.raises(ValueError, match=message):
        CORRECTION.measure(quantizable(tiny_unet), other, Sampling(DDIM(4)), seed=0, batch=2)
    CORRECTION.check_training(SCHEDULE)
    NoCorrection().check_training(schedule)


def test_statistics_of_real_timesteps_are_read_back_exactly(tmp_path: Path) -> None:
    timesteps = tuple(torch.tensor([785.954, 427.4898, 0.3, 1e-3]).double().tolist())
    stored = NoiseStatistics(timesteps, torch.ones(4), torch.ones(4), torch.ones(4, 3), torch.ones(4))
    save_file(stored.tensors(), tmp_path / "statistics.safetensors")
    assert NoiseStatistics.of(load_file(tmp_path / "statistics.safetensors")).timesteps == timesteps
