"""Phases that learn scales, alone or with the rounding, on small networks."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import quantizable
from tests.helpers.calibration import calibration
from tests.helpers.reconstruction import ROUNDING, Interruption, MemoryCheckpointer, RecordedProgress, config, context
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.methods.activations import CalibrateRanges, LearnRanges
from tfmq_exp.methods.weights import ReconstructJointly
from tfmq_exp.qat.training_noise import TrainingNoise
from tfmq_exp.quant.scales.generator import Frequency
from tfmq_exp.quant.scales.observed_ranges import TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.reconstruction.objectives import Lp
from tfmq_exp.reconstruction.units import MixedInputs, TemporalAware
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.surgery.config import Bits, LayerBits, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

INTERVALS = TimestepGroupConfig(2, 1000)


GENERATED = TDQConfig(Frequency(32), (16, 16), 0.1, "zero")


SOURCES: dict[str, Any] = {
    "static": "none",
    "per step": "all",
    "intervals": ScalePlan(INTERVALS, INTERVALS),
    "generated": ScalePlan(GENERATED, GENERATED),
}


SHARDS = CalibrateRanges(12, EveryKth(1))


def frozen(network: nn.Module, **further: Any) -> QuantizedNetwork:
    """Integer weights, activations still off."""
    model = quantizable(network, **further)
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    return model


def end_of_network(weight: int, activation: Bits) -> dict[str, Any]:
    """A plan of four units: temporal layers, two blocks, the last layer."""
    plan = LayerBits(weight, activation)
    sites = dict.fromkeys(("time_embedding.*", "up_blocks.1.*", "conv_out"), plan)
    return {"weight": None, "activation": None, "sites": sites}


def run(
    phase: Any,
    model: QuantizedNetwork,
    network: nn.Module,
    shelf: MemoryCheckpointer | None = None,
    log: RecordedProgress | None = None,
) -> MemoryCheckpointer:
    """A method's phase until the end, or until the log interrupts."""
    shelf = shelf or MemoryCheckpointer()
    with contextlib.suppress(Interruption):
        phase(context(model, network, calibration(network), shelf, log))
    return shelf


def learn(iterations: int, **further: Any) -> LearnRanges:
    return LearnRanges(SHARDS, TemporalAware(), EveryKth(1), config(iterations, **further))


def trainable(model: QuantizedNetwork) -> dict[str, list[Tensor]]:
    quantizers = model.activation_quantizers().items()
    return {name: [p.detach().clone() for p in quantizer.scale_provider.trainable()] for name, quantizer in quantizers}


def same_state(one: QuantizedNetwork, other: QuantizedNetwork) -> bool:
    """Bit-equal weights, scales and zero points."""
    states = [model.network.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def jointly(iterations: int, quant_prob: float = 0.5) -> ReconstructJointly:
    both = config(iterations, rate=2e-3, rounding=ROUNDING, objective=Lp(), inputs=MixedInputs(quant_prob))
    return ReconstructJointly(TemporalAware(), EveryKth(1), both, SHARDS)


def noise_with(alphas: Tensor) -> TrainingNoise:
    """A training's noise with these alpha-bars, of a network that predicts it."""
    betas = 1 - alphas.double() / torch.cat([torch.ones(1), alphas[:-1]]).double()
    schedule = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    return TrainingNoise.of(
        {**schedule, "num_train_timesteps": len(alphas), "trained_betas": betas.tolist()}, DDIM(1, steps_offset=0)
    )
