"""The tiny denoiser's noise and shape, and the outputs of tiny networks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.sampling.trajectory import Predict
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SHAPE = (3, 8, 8)


def predictor(network: nn.Module) -> Predict:
    """The network's own prediction, without guidance."""
    return Sampling(DDIM(1)).predictor(network)


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The prediction for some inputs."""
    return model(**inputs).sample


def reloaded(model: QuantizedNetwork, folder: Path) -> QuantizedNetwork:
    """The model from its file."""
    model.tabulate_scales()
    serialization.save(model, folder / "model.safetensors")
    return serialization.load(folder / "model.safetensors")
