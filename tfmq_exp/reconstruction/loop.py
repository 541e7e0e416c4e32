"""Reconstruction of a quantized network, unit by unit."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tfmq_exp.core.finite import relative, within
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.callbacks import UnitReport, peak_memory_mib
from tfmq_exp.reconstruction.capture import Capture, UnitActivations, groups_within, sample_bytes
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.inputs import Origin
from tfmq_exp.reconstruction.learning import UnitData, freeze_unit, is_learnable, learn_unit, unit_result
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.replay import OutputReplay, run_unit
from tfmq_exp.reconstruction.units import Unit

ERROR_SAMPLES = 128  # a unit's error is measured on every k-th sample: so many, or up to twice as many


def reconstruct(context: ReconstructionContext, units: Sequence[Unit], config: ReconstructionConfig) -> None:
    """Learn the rounding of weights, activation scales, or both, unit by unit (BRECQ, arXiv 2102.05426, algorithm 1).

    1. Restore the units that an interrupted run has finished.
    2. For each other unit, in execution order:
       a. capture its outputs in the float network, and its inputs in the networks that the config names;
       b. measure its error, with weights rounded to nearest;
       c. learn;
       d. freeze its weights to integers;
       e. measure its error again, and keep its outputs for the passes that capture later units;
       f. save and report it.

    The random numbers of a unit depend on the seed and its name alone, so a resumed run ends with the same bits.

    Raises:
        ValueError: data at a timestep outside the finite set.
    """
    model, compute = context.model, context.compute
    model.context.require(context.data.t.unique().tolist())
    remaining = restore_finished(context, [unit for unit in units if is_learnable(model, unit, config)], config)
    storage, replay = compute.storage(4), OutputReplay(compute.cache_bytes // 4)
    for unit, activations, importance in capture_float_units(context, remaining, config):
        start = time.perf_counter()
        inputs: dict[Origin, Any] = dict.fromkeys(config.inputs.origins, activations.inputs)
        if captured := unit.driver == "denoiser" and "quantized" in inputs:
            inputs["quantized"] = quantized_inputs(context, unit, replay, storage)
        data = UnitData(inputs, activations.outputs, importance)
        rounded = modes(model.weight_quantizers(unit.layers) if config.rounding else (), Mode.QUANTIZE)
        with rounded, within(f"the quantized unit {unit.name}"):
            error_before = unit_error(context, unit, data)
            learn_unit(context, unit, data, config)
        if config.rounding:
            freeze_unit(model, unit)
        error_after = unit_error(context, unit, data, replay if captured else None)
        storage.clear()
        weights = sum(context.structure.layers[layer].weights for layer in unit.layers)
        size = (unit.name, unit.kind.value, len(unit.layers), weights)
        report = UnitReport(*size, error_before, error_after, time.perf_counter() - start, peak_memory_mib())
        context.checkpointer.put(unit.name, unit_result(model, unit, config), report)
        context.progress.on_unit_end(unit.name, report)


def restore_finished(
    context: ReconstructionContext, units: Sequence[Unit], config: ReconstructionConfig
) -> Sequence[Unit]:
    """Restore the leading units that were saved, calibrate the weights of the others, and return these."""
    model, count = context.model, 0
    context.progress.on_start(len(units))
    for unit in units:
        if (result := context.checkpointer.get(unit.name)) is None:
            break
        for layer, integers in result.integers.items():
            model.freeze(layer, integers)
        model.load_activations(result.activations)
        context.progress.on_unit_end(unit.name, None)
        count += 1
    if config.rounding:
        model.calibrate_weights()
    return units[count:]


def capture_float_units(
    context: ReconstructionContext, units: Sequence[Unit], config: ReconstructionConfig
) -> Iterator[tuple[Unit, UnitActivations, TensorTree | None]]:
    """Each unit with its activations in the float network and the importance of its outputs.

    One pass over the data captures as many units as fit into half of the cache.
    """
    unet, data, compute = context.float_unet, context.data, context.compute
    with_inputs, capture = "float" in config.inputs.origins, Capture(data, compute.batch, compute.storage(2))
    driven = {unit.name: unit for unit in units if unit.driver == "denoiser"}
    sizes = sample_bytes(unet, list(driven.values()), data, with_inputs=with_inputs)
    groups = groups_within({name: sizes[name] * len(data) for name in driven}, capture.storage.budget)
    activations: dict[str, UnitActivations] = {}
    importance: dict[str, TensorTree] = {}
    for unit in units:
        if unit.driver == "timesteps":
            yield unit, timestep_activations(context, unit), None
            continue
        if unit.name not in activations:
            capture.storage.clear()
            group = [driven[name] for names in groups if unit.name in names for name in names]
            activations = capture.activations(unet, group, with_inputs=with_inputs)
            importance = dict(config.objective.importance(unet, group, capture))
        yield unit, activations.pop(unit.name), importance.pop(unit.name, None)


@torch.no_grad()
def timestep_activations(context: ReconstructionContext, unit: Unit) -> UnitActivations:
    """Activations of a float unit that the sampler's timesteps drive: one row per timestep."""
    t = torch.tensor(context.model.context.timesteps)
    outputs = unit.module(context.float_unet)(t.to(next(context.float_unet.parameters()).device))
    return UnitActivations(TensorTree.of((t, (t,), {})), TensorTree.of(outputs))


def quantized_inputs(
    context: ReconstructionContext, unit: Unit, replay: OutputReplay, storage: SpillAllocator
) -> TensorTree:
    """Inputs of a unit in the network whose earlier units are quantized."""
    model, batch = context.model, context.compute.batch
    with replay.active(batch), within(f"the inputs of {unit.name} in the quantized network"):
        return Capture(context.data, batch, storage).inputs(model, unit.module(model.unet))


def unit_error(context: ReconstructionContext, unit: Unit, data: UnitData, replay: OutputReplay | None = None) -> float:
    """Relative error of the quantized unit's outputs on part of the samples.

    Args:
        context: networks and resources.
        unit: the unit.
        data: its inputs and the float unit's outputs for all calibration samples.
        replay: if given, the unit runs on all samples, and its outputs are kept there.
    """
    model, compute, module = context.model, context.compute, unit.module(context.model.unet)
    inputs = next(iter(data.inputs.values()))
    inputs = inputs if replay else every_kth(inputs)
    outputs = run_unit(module, model.context, inputs, compute.batch, compute.storage(4 if replay else 1))
    if replay:
        replay.add(module, outputs)
        outputs = every_kth(outputs)
    return relative_error(outputs, every_kth(data.targets))


def every_kth(tree: TensorTree) -> TensorTree:
    """The samples that errors are measured on."""
    return tree.every(max(1, len(tree) // ERROR_SAMPLES))


def relative_error(outputs: TensorTree, targets: TensorTree) -> float:
    """Mean squared error of the outputs over their variance, averaged over the outputs."""
    pairs = [(x, y.to(x)) for x, y in zip(outputs.tensors, targets.tensors, strict=True)]
    sizes = [((x - y).square().mean(), y.var(correction=0)) for x, y in pairs]
    errors = [float(relative(*size, "the outputs of a unit")) for size in sizes]
    return sum(errors) / len(errors)
