"""Small stored transformers with four-bit weights, and the conditions that their temporal features are stored for."""

import torch
from torch import Tensor

from tests.helpers.transformers import Stored
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

FOUR_BITS = {role.value: LayerBits(4, None) for role in Role}


def steps_of(stored: Stored) -> tuple[float | int, ...]:
    whole = stored.settings["timestep_dtype"] == "int64"
    t = stored.timesteps
    return tuple((t if whole else t.float().double()).flip(0).tolist())


def conditions_of(stored: Stored) -> dict[str, Tensor]:
    """Conditions of the stored samples, and as many others."""
    data = stored.calibration()
    names = family_of(stored.network).conditions_of(data.conditions)
    given = {name: data.conditions[name] for name in names}
    others = {k: (v + 1).clamp(max=2) if not v.is_floating_point() else v * 1.5 for k, v in given.items()}
    return {name: torch.cat([value, others[name]]) for name, value in given.items()}


def quantized(stored: Stored) -> QuantizedNetwork:
    """Four-bit weights rounded to nearest, float activations."""
    scales = ScalePlan(StaticConfig(), StaticConfig())
    config = QuantizationConfig(FOUR_BITS, AttentionBits())
    plan = resolve(config, stored.structure(), (), scales, steps_of(stored))
    model = build_quantized_network(stored.network, plan, MinMax())
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    return model
