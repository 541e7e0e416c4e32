"""Reconstruction of a quantized network, unit by unit."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback, LambdaCallback
from torch.utils import _pytree as pytree

from tfmq_exp.core.distributed import concatenated
from tfmq_exp.core.finite import DivergedError, relative, within
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, modes
from tfmq_exp.reconstruction.activation_cache import TensorTree, has_samples
from tfmq_exp.reconstruction.capture import (
    Capture,
    UnitActivations,
    groups_within,
    run_unit,
    sample_bytes,
    shared_inputs,
)
from tfmq_exp.reconstruction.closed_form import round_layers
from tfmq_exp.reconstruction.context import ReconstructionContext, UnitReport, UnitResult, peak_memory_mib
from tfmq_exp.reconstruction.early_stop import StopOnceSettled
from tfmq_exp.reconstruction.module import BlockReconstruction, ReconstructionConfig
from tfmq_exp.reconstruction.output_replay import OutputReplay
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.temporal_inputs import temporal_inputs
from tfmq_exp.reconstruction.units import Origin, Unit
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

ERROR_SAMPLES = 128  # a unit's error is measured on every k-th sample: so many, or up to twice as many


def reconstruct(context: ReconstructionContext, units: Sequence[Unit], config: ReconstructionConfig) -> None:
    """Learn the rounding of weights, activation scales, or both, unit by unit (BRECQ, arXiv 2102.05426, algorithm 1).

    1. Restore the units that an interrupted run has finished.
    2. For each other unit, in execution order:
       a. capture its outputs in the float network, and its inputs in the networks that the config names;
       b. measure its error, with weights rounded to nearest;
       c. round its weights in closed form (GPTQ), learn, or both;
       d. freeze its weights to integers;
       e. measure its error again, and keep its outputs for the passes that capture later units;
       f. save and report it.

    The random numbers of a unit depend on the seed and its name alone, so a resumed run ends with the same bits.

    Raises:
        ValueError: data at a timestep outside the finite set.
        DivergedError: a loss or a learned number is not finite.
    """
    model, compute = context.model, context.compute
    model.context.require(context.data.t.unique().tolist())
    remaining = restore_finished(context, [unit for unit in units if is_learnable(model, unit, config)], config)
    storage = compute.storage(4, config.cache, of_device=0.5)
    # outputs on inputs of fewer bits are not those of the network, and what later units read must not depend on what fits
    replay = OutputReplay(compute.cache_bytes // 4 if config.cache == "float32" else 0)
    driven = [unit for unit in remaining if unit.driver == "denoiser"]
    shared = shared_inputs(context.float_unet, driven, context.data) if driven else {}
    for unit, activations in capture_float_units(context, remaining, config, shared):
        start, module = time.perf_counter(), unit.module(model.unet)
        inputs: dict[Origin, Any] = dict.fromkeys(config.inputs.origins, activations.inputs.get("float"))
        if captured := unit.driver == "denoiser" and "quantized" in inputs:
            with replay.active(compute.batch), within(f"the inputs of {unit.name} in the quantized network"):
                capture = Capture(context.data, compute.batch, storage)
                inputs["quantized"] = capture.inputs(model, module, shared[unit.name])
        activations = activations._replace(inputs=inputs)
        rounded = modes(model.weight_quantizers(unit.layers) if config.rounds else (), Mode.QUANTIZE)
        with rounded, within(f"the quantized unit {unit.name}"):
            error_before = unit_error(context, unit, activations)
            if config.gptq:
                layers = {name: model.layer(name) for name in unit.layers if name in model.weight_layers()}
                given, seed = next(iter(activations.inputs.values())), derive_seed(context.seed, unit.name)
                round_layers(module, layers, model.context, given, config.gptq, batch=compute.batch, seed=seed)
            if config.learns:
                learn_unit(context, unit, activations, config)
        for layer in unit.layers:
            if config.rounds and layer in model.weight_layers():
                model.freeze(layer)
        error_after = unit_error(context, unit, activations, replay if captured else None)
        storage.clear()
        weights = sum(context.structure.layers[layer].weights for layer in unit.layers)
        size = (unit.name, unit.kind.value, len(unit.layers), weights)
        report = UnitReport(*size, error_before, error_after, time.perf_counter() - start, peak_memory_mib())
        context.checkpointer.put(unit.name, unit_result(model, unit, config), report)
        context.progress.on_unit_end(unit.name, report)
        del activations, inputs  # the pass that captures the next units needs the room


def quantizers_of(model: QuantizedUNet, unit: Unit, config: ReconstructionConfig) -> dict[str, AffineQuantizer]:
    """Activation quantizers of a unit that the config learns."""
    found = model.activation_quantizers_in(unit.name, unit.layers) if config.scales else {}
    return {
        name: quantizer for name, quantizer in found.items() if any(True for _ in quantizer.scale_provider.trainable())
    }


def is_learnable(model: QuantizedUNet, unit: Unit, config: ReconstructionConfig) -> bool:
    """Whether a unit has weights or scales that the config learns."""
    weights = set(unit.layers).intersection(model.weight_layers()) if config.rounds else set()
    return bool(weights or quantizers_of(model, unit, config))


def unit_result(model: QuantizedUNet, unit: Unit, config: ReconstructionConfig) -> UnitResult:
    """Learned integer weights and activation quantizers of a unit, for its checkpoint."""
    activations = {
        f"{name}.{key}": value.detach().clone()
        for name, quantizer in quantizers_of(model, unit, config).items()
        for key, value in quantizer.state_dict().items()
    }
    integers = model.integers if config.rounds else {}
    return UnitResult({layer: integers[layer] for layer in unit.layers if layer in integers}, activations)


def restore_finished(
    context: ReconstructionContext, units: Sequence[Unit], config: ReconstructionConfig
) -> Sequence[Unit]:
    """Restore the leading units that were saved, calibrate the weights of the others, and return these."""
    model, count = context.model, 0
    context.progress.on_start(len(units))
    while count < len(units) and (result := context.checkpointer.get(units[count].name)) is not None:
        for site, integers in result.integers.items():
            model.freeze(site, integers)
        model.load_activations(result.activations)
        context.progress.on_unit_end(units[count].name, None)
        count += 1
    if config.rounds:
        model.calibrate_weights()
    return units[count:]


def capture_float_units(
    context: ReconstructionContext,
    units: Sequence[Unit],
    config: ReconstructionConfig,
    shared: Mapping[str, Sequence[bool]],
) -> Iterator[tuple[Unit, UnitActivations]]:
    """Each unit with its activations in the float network; one pass captures as many units as fit into half of the cache."""
    unet, data, compute = context.float_unet, context.data, context.compute
    with_inputs = "float" in config.inputs.origins
    capture = Capture(data, compute.batch, compute.storage(2, config.cache, of_device=0.5))
    driven = {unit.name: unit for unit in units if unit.driver == "denoiser"}
    sizes = sample_bytes(unet, [*driven.values()], data, with_inputs=with_inputs, form=config.cache)
    groups = groups_within({name: sizes[name] * len(data) for name in driven}, capture.storage.capacity)
    activations: dict[str, UnitActivations] = {}
    for unit in units:
        if unit.driver == "timesteps":
            inputs, rows = temporal_inputs(unet, data, context.model.context), compute.storage(4, of_device=0.5)
            outputs = run_unit(unit.module(unet), context.model.context, inputs, max(compute.batch, len(inputs)), rows)
            yield unit, UnitActivations({"float": inputs}, outputs)
            continue
        if unit.name not in activations:
            capture.storage.clear()
            group = [driven[name] for names in groups if unit.name in names for name in names]
            activations = capture.activations(unet, group, shared, with_inputs=with_inputs)
            for name, importance in config.objective.importance(unet, group, capture).items():
                activations[name] = activations[name]._replace(importance=importance)
        yield unit, activations.pop(unit.name)


def learn_unit(
    context: ReconstructionContext, unit: Unit, activations: UnitActivations, config: ReconstructionConfig
) -> None:
    """Learn one unit of the quantized network, whose earlier units are learned; its weights end rounded up or down."""
    model, seed, processes = context.model, derive_seed(context.seed, unit.name), context.compute.processes
    module, device = unit.module(model.unet), next(model.parameters()).device
    importance = activations.importance.whole if activations.importance else None
    captured = {origin: tree.whole for origin, tree in activations.inputs.items()}
    samples = TensorTree({"inputs": captured, "targets": activations.outputs.whole, "importance": importance})
    roundings = (
        [rounding for layer in unit.layers for rounding in model.learn_rounding(layer)] if config.rounding else []
    )
    sources = [quantizer.scale_provider for quantizer in quantizers_of(model, unit, config).values()]
    task = BlockReconstruction(
        module, model.context, roundings, sources, samples, config, seed=seed, processes=processes
    )

    def set_training(training: bool) -> None:
        """Let scales learn, with their dropout."""
        for source in sources:
            source.train(training)
        for parameter in task.scale_parameters:
            parameter.requires_grad_(training)

    def report_loss(*_: Any) -> None:
        loss = float(task.error)
        if not math.isfinite(loss):
            raise diverged(loss)
        context.progress.on_iteration_end(unit.name, task.iteration, config.iterations, loss)

    def diverged(loss: float) -> DivergedError:
        return DivergedError(f"the unit {unit.name}", task.iteration, config.iterations, loss, config.learning_rates)

    rows, callbacks = torch.arange(len(samples)), list[Callback]([LambdaCallback(on_train_batch_end=report_loss)])
    if early := config.early_stop:
        rows, held_out = early.split(len(samples), seed, hold_back=unit.driver == "denoiser")
        callbacks.append(StopOnceSettled(early, task, held_out))
    batches = RandomRows(rows, config.batch, config.iterations, seed)
    trainer = context.compute.trainer(max_epochs=1, callbacks=callbacks)
    quantizers = list(model.activation_quantizers_in(unit.name, unit.layers).values())
    with torch.enable_grad(), torch.random.fork_rng(), config.inputs.learning_context(quantizers):
        torch.manual_seed(seed)
        set_training(True)
        trainer.fit(task, batches)
        set_training(False)
    task.to(device)  # Lightning leaves the unit and its context on the CPU
    learned = concatenated([x.detach() for x in task.learned])
    processes.check_same(f"what {unit.name} has learned", learned)
    if not bool(learned.isfinite().all()):  # a NaN would be rounded down like any other number
        raise diverged(math.nan)
    for rounding in roundings:
        rounding.harden()


def unit_error(
    context: ReconstructionContext, unit: Unit, activations: UnitActivations, replay: OutputReplay | None = None
) -> float:
    """Mean squared error of the quantized unit's outputs over their variance, averaged over the outputs, on some samples.

    With `replay`, the unit runs on all samples, and its outputs are kept there, if it can hold them.
    """
    model, compute, module = context.model, context.compute, unit.module(context.model.unet)
    inputs, exact = next(iter(activations.inputs.values())), activations.outputs
    if replay and replay.holds(exact):
        outputs = run_unit(module, model.context, inputs, compute.batch, compute.storage(4))
        replay.add(module, outputs)
        outputs = outputs.thinned(ERROR_SAMPLES)
    else:
        outputs = run_unit(module, model.context, inputs.thinned(ERROR_SAMPLES), compute.batch, compute.storage())
    both = (pytree.tree_leaves(tree.structure(tree.tensors)) for tree in (outputs, exact.thinned(ERROR_SAMPLES)))
    device = next(model.parameters()).device
    pairs = [(x.to(device), y.to(device, x.dtype)) for x, y in zip(*both, strict=True) if has_samples(x)]
    sizes = [((x - y).square().mean(), y.var(correction=0)) for x, y in pairs]
    errors = [float(relative(*size, "the outputs of a unit")) for size in sizes]
    return sum(errors) / len(errors)
