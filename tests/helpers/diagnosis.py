"""What is diagnosed in these tests: a tiny network of either family, finished, with everything that can be quantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.conftest import calibrated, example_inputs, quantizable
from tests.helpers.calibration import collect
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser, NoConditions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.sampling.conditioning import Classes, Unconditional
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.surgery.config import AttentionBits
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
OPERANDS = AttentionBits(operands=8, probabilities=8)


class Contexts:
    """Three fixed contexts of five tokens, and that of no condition."""

    def __init__(self) -> None:
        self.rows = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0))

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        return Conditions({"encoder_hidden_states": self.rows[list(choices)]}, {"encoder_hidden_states": self.rows[3:]})

    def example(self) -> Conditions:
        return self([0])

    def to(self, device: torch.device) -> None:
        self.rows = self.rows.to(device)


@dataclass(frozen=True)
class Subject:
    """The finished model, the float one, and how both are sampled: in four steps, guided where there are conditions."""

    model: QuantizedNetwork
    denoiser: Denoiser
    structure: NetworkStructure
    sampling: Sampling

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def data(self, images: int = 3) -> CalibrationSet:
        return collect(self.denoiser, self.sampling, images=images, seed=0, batch=images)


def subject_of(network: nn.Module, **choices: Any) -> Subject:
    model = calibrated(quantizable(network, **{"attention": OPERANDS, **choices}))
    conditional = "encoder_hidden_states" in example_inputs(network)
    encoder = Contexts() if conditional else NoConditions()
    shape = (network.config["in_channels"], 8, 8)
    denoiser = Denoiser("tiny", network, shape, SCHEDULE, "0" * 64, encoder=encoder)
    conditioning = Classes(3) if conditional else Unconditional()
    sampling = Sampling(DDIM(4), conditioning, guidance=3.0 if conditional else 1.0)
    return Subject(model, denoiser, read_structure(network, example_inputs(network)), sampling)
