"""An iteration on a GPU: nothing is left on the CPU, and nothing is read back."""

import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from tests.conftest import TIMESTEPS, generic
from tests.helpers.reconstruction import ROUNDING, config
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.module import BlockReconstruction
from tfmq_exp.reconstruction.recorded_calls import StopForward, recorded_calls
from tfmq_exp.reconstruction.units import Blockwise
from tfmq_exp.surgery.config import Bits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import build_quantized_network
from tfmq_exp.surgery.resolve import resolve

ROWS = 4
BITS: list[Bits] = [8, (4, 8)]


def small() -> UNet2DModel:
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(
        8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=16, **types
    )


@pytest.fixture(scope="module")
def structure() -> NetworkStructure:
    return read_structure(small(), {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.zeros(1)})


def tasks(
    network: UNet2DModel, structure: NetworkStructure, bits: Bits, device: torch.device
) -> list[tuple[BlockReconstruction, list[Any]]]:
    """Every unit that learns its rounding and its scales together, with a batch of its inputs and outputs."""
    x, t = torch.randn(ROWS, 3, 8, 8, device=device), torch.tensor(TIMESTEPS, device=device)
    roles = {role.value: LayerBits(4, bits) for role in Role}
    scales = ScalePlan(PerStepConfig(), StaticConfig())
    plan = resolve(QuantizationConfig(roles), structure, tuple(attentions(network)), scales, TIMESTEPS)
    model = build_quantized_network(network, plan, MinMax())
    for quantizer in (*model.weight_quantizers(), *model.activation_quantizers().values()):
        quantizer.mode = Mode.QUANTIZE
    found = []
    for unit in Blockwise()(structure, frozenset(plan.layers)):
        with recorded_calls({unit.name: unit.module(network)}) as calls, torch.no_grad(), suppress(StopForward):
            network(sample=x, timestep=t)
        args, kwargs, outputs = calls[unit.name]
        samples = TensorTree({"inputs": {"float": (t, args, kwargs)}, "targets": outputs, "importance": None})
        roundings = [rounding for layer in unit.layers for rounding in model.learn_rounding(layer)]
        sources = [q.scale_provider for q in model.activation_quantizers_in(unit.name, unit.layers).values()]
        for parameter in (parameter for source in sources for parameter in source.trainable()):
            parameter.requires_grad_().data.fill_(0.1)
        recipe = config(4, rounding=ROUNDING)
        task = BlockReconstruction(unit.module(model.network), model.context, roundings, sources, samples, recipe)
        found.append((task, samples.tensors))
    return found


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_an_iteration_reads_no_number_and_mixes_no_devices(structure: NetworkStructure, bits: Bits) -> None:
    """On torch's device without numbers, which refuses both."""
    device = torch.device("meta")
    with device:
        found = tasks(small(), structure, bits, device)
    assert len(found) == len(structure.blocks)
    for task, batch in found:
        for _ in range(3):
            task.iterate(batch)
        assert {x.device for x in (task.error, *task.learned)} == {device}
    with pytest.raises(RuntimeError, match="meta"):  # so a look would be noticed
        float(task.error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_host_does_not_wait_for_an_iteration(structure: NetworkStructure, bits: Bits) -> None:
    device = torch.device("cuda", 0)
    for task, batch in tasks(generic(small).to(device), structure, bits, device):
        task.iterate(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.cuda.set_sync_debug_mode("error")
            try:
                task.iterate(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert bool(task.error.isfinite())
