"""A network with random weights as it is quantized by TFMQ-DM, w4a8: what its units and its images cost."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from random_denoiser import random_denoiser
from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.quant.observers import LpObserver, MinMax, Observer
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig
from tfmq_exp.reconstruction.capture import UnitActivations
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, quiet_trainer
from tfmq_exp.reconstruction.loop import capture_float_units
from tfmq_exp.reconstruction.module import BlockReconstruction, LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import FloatInputs, TemporalAware, Unit
from tfmq_exp.sampling.conditioning import Classes, Unconditional
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM, PLMS
from tfmq_exp.surgery.config import LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import ResolvedConfig, resolve

CONF = Path(__file__).parents[2] / "conf"
EDGES = {Role.STEM: LayerBits(8, None), Role.HEAD: LayerBits(8, 8)}  # conf/method/surgery/default.yaml


def recipe_of(iterations: int, batch: int) -> ReconstructionConfig:
    """AdaRound with the releases' numbers (conf/method/weights/reconstruct.yaml), on the float network's inputs."""
    rounding = LearnRounding(1e-3, 0.01, Annealing(0.2, 20.0, 2.0))
    return ReconstructionConfig(iterations, batch, Lp(), FloatInputs(), rounding)


def resolved(denoiser: Denoiser, structure: NetworkStructure, timesteps: tuple[float, ...]) -> ResolvedConfig:
    """Every layer with 4-bit weights and 8-bit inputs; a scale per step for temporal layers, one for all others."""
    roles = {role.value: EDGES.get(role, LayerBits(4, 8)) for role in Role}
    scales = ScalePlan(PerStepConfig(), StaticConfig())
    return resolve(QuantizationConfig(roles), structure, tuple(attentions(denoiser.network)), scales, timesteps)


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """The same kind of network with 32 channels at two sizes, for a test of every line."""
    params = config["model"]["params"]
    network, stage = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    params["image_size"] = network["image_size"] = 8
    network |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2]}
    if "context_dim" in network:
        network |= {"context_dim": 32, "num_heads": 2}
    stage |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    return config


@dataclass
class Network:
    """A model of `conf/model`: its float network, its quantized ones, and the numbers of its protocol.

    Args:
        name: of its file.
        device: of all networks.
        quick: a small network and little work.
    """

    name: str
    device: torch.device
    quick: bool
    iteration_seconds: dict[str, float] = field(default_factory=dict)  # of one iteration, by unit
    row_seconds: dict[str, float] = field(default_factory=dict)  # of one row of a network call, by variant
    weight_range_seconds: float = 0.0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The model's file, as plain YAML."""
        return yaml.safe_load((CONF / f"model/{self.name}.yaml").read_text(encoding="utf-8"))

    @cached_property
    def protocol(self) -> Mapping[str, Mapping[str, Any]]:
        """The protocol's file over the default one, as plain YAML."""
        files = [
            yaml.safe_load((CONF / f"protocol/{name}.yaml").read_text(encoding="utf-8"))
            for name in ("default", self.name)
        ]
        return {part: values | files[1].get(part, {}) for part, values in files[0].items() if part != "defaults"}

    @cached_property
    def denoiser(self) -> Denoiser:
        """Random weights on the device."""
        config = self.settings["denoiser"]["config"]
        return random_denoiser(self.name, json.dumps(smaller(config) if self.quick else config), str(self.device))

    @cached_property
    def sampling(self) -> Sampling:
        """Sampler and guidance of the model; classes stand for captions."""
        asked, guidance = self.protocol["sampling"], self.settings["sampling"]["guidance"]
        steps = 4 if self.quick else asked["num_inference_steps"]
        sampler = DDIM(steps, eta=asked["eta"]) if guidance == 1 else PLMS(steps)
        conditioning = Unconditional() if guidance == 1 else Classes(1000)
        return Sampling(sampler, conditioning, guidance)

    @cached_property
    def structure(self) -> NetworkStructure:
        """Roles and blocks of its layers."""
        return read_structure(self.denoiser.network, self.denoiser.example())

    @cached_property
    def plan(self) -> ResolvedConfig:
        """Quantizers of every layer."""
        return resolved(self.denoiser, self.structure, self.sampling.finite_set(self.denoiser))

    def quantizable(self, observer: Observer) -> QuantizedNetwork:
        """A quantized copy without ranges."""
        return build_quantized_network(self.denoiser.network, self.plan, observer)

    @cached_property
    def learning(self) -> QuantizedNetwork:
        """The network whose weights are learned; its ranges are not set yet."""
        return self.quantizable(LpObserver())

    @cached_property
    def quantized(self) -> QuantizedNetwork:
        """The network that is sampled: weights rounded to nearest, ranges of activations from noise."""
        model = self.quantizable(MinMax())
        model.calibrate_weights()
        for layer in model.weight_layers():
            model.freeze(layer)
        model.set_activations(Mode.OBSERVE)
        for start in range(0, model.context.num_steps, self.batch):
            steps = range(start, min(start + self.batch, model.context.num_steps))
            model(**self.noise(len(steps), start).inputs(self.device))
        model.set_activations(Mode.QUANTIZE)
        return model

    @cached_property
    def units(self) -> list[Unit]:
        """Units of TFMQ-DM: the Temporal Information Block, then the blocks."""
        return TemporalAware()(self.structure, frozenset(self.plan.layers))

    def macs(self, unit: Unit) -> int:
        """Multiply-accumulates of a unit's layers for one row."""
        return sum(self.structure.layers[layer].macs for layer in unit.layers)

    @property
    def by_size(self) -> list[Unit]:
        """Units, the one with the most multiply-accumulates first."""
        return sorted(self.units, key=self.macs, reverse=True)

    @property
    def largest_and_median(self) -> dict[str, Unit]:
        """Two units by their multiply-accumulates."""
        return {"largest": self.by_size[0], "median": self.by_size[len(self.units) // 2]}

    @property
    def batch(self) -> int:
        """Samples of an iteration."""
        return 2 if self.quick else self.protocol["reconstruction"]["batch_size"]

    def noise(self, rows: int, first: int = 0) -> CalibrationSet:
        """Inputs of the network: noise, each row at the next timestep of the finite set."""
        step = torch.arange(first, first + rows) % len(self.plan.timesteps)
        x = torch.randn(rows, *self.denoiser.sample_shape, generator=torch.Generator().manual_seed(first))
        conditions = dict(self.denoiser.encoder.example().given)
        t, zeros = torch.tensor(self.plan.timesteps)[step], torch.zeros(rows, dtype=torch.long)
        return CalibrationSet(x, t, step, zeros, conditions, zeros)

    def activations(self, unit: Unit, rows: int, device_cache_bytes: int) -> UnitActivations:
        """Inputs and outputs of a unit in the float network, on the device as far as its cache reaches."""
        compute = ComputeConfig(
            self.batch, 2**34, quiet_trainer(self.device), device=self.device, device_cache_bytes=device_cache_bytes
        )
        networks = self.learning, self.denoiser.network, self.structure
        unused: Any = None  # capturing saves and reports nothing
        context = ReconstructionContext(*networks, self.noise(rows), compute, 0, unused, unused)
        ((_, found),) = capture_float_units(context, [unit], recipe_of(1, self.batch))
        return found


@contextmanager
def learned_unit(
    model: QuantizedNetwork,
    unit: Unit,
    activations: UnitActivations,
    recipe: ReconstructionConfig,
    device: torch.device,
) -> Iterator[BlockReconstruction]:
    """Learn a unit inside the block, without Lightning's trainer; its weights end rounded up or down.

    Args:
        model: with ranges of weights.
        unit: to learn.
        activations: in the float network.
        recipe: of learning.
        device: of the model.
    """
    inputs = {"float": activations.inputs["float"].whole}
    samples = replace(
        activations.outputs, whole={"inputs": inputs, "targets": activations.outputs.whole, "importance": None}
    )
    roundings = [rounding for layer in unit.layers for rounding in model.learn_rounding(layer)]
    module: nn.Module = unit.module(model.network)
    with modes(model.weight_quantizers(unit.layers), Mode.QUANTIZE), torch.enable_grad():
        yield BlockReconstruction(module, model.context, roundings, [], samples, recipe).to(device)
    for rounding in roundings:
        rounding.harden()
