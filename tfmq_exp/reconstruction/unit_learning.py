"""Reconstruction of one unit from its activations: its rounding, its scales, its error before and after."""

import math
import time
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback, LambdaCallback
from torch.utils import _pytree as pytree

from tfmq_exp.core.devices import device_of
from tfmq_exp.core.distributed import concatenated
from tfmq_exp.core.finite import DivergedError, relative, within
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, modes
from tfmq_exp.reconstruction.activation_cache import TensorTree, has_samples
from tfmq_exp.reconstruction.capture import UnitActivations, run_unit
from tfmq_exp.reconstruction.closed_form import round_layers
from tfmq_exp.reconstruction.context import ReconstructionContext, UnitReport, UnitResult, peak_memory_mib
from tfmq_exp.reconstruction.early_stop import StopOnceSettled
from tfmq_exp.reconstruction.module import BlockReconstruction, ReconstructionConfig
from tfmq_exp.reconstruction.output_replay import OutputReplay
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

ERROR_SAMPLES = 128  # a unit's error is measured on every k-th sample: so many, or up to twice as many


def quantizers_of(model: QuantizedNetwork, unit: Unit, config: ReconstructionConfig) -> dict[str, AffineQuantizer]:
    """Activation quantizers of a unit that the config learns."""
    found = model.activation_quantizers_in(unit.name, unit.layers) if config.scales else {}
    return {
        name: quantizer for name, quantizer in found.items() if any(True for _ in quantizer.scale_provider.trainable())
    }


def is_learnable(model: QuantizedNetwork, unit: Unit, config: ReconstructionConfig) -> bool:
    """Whether a unit has weights or scales that the config learns."""
    weights = set(unit.layers).intersection(model.weight_layers()) if config.rounds else set()
    return bool(weights or quantizers_of(model, unit, config))


def unit_result(model: QuantizedNetwork, unit: Unit, config: ReconstructionConfig) -> UnitResult:
    """Learned integer weights and activation quantizers of a unit, for its checkpoint."""
    activations = {
        f"{name}.{key}": value.detach().clone()
        for name, quantizer in quantizers_of(model, unit, config).items()
        for key, value in quantizer.state_dict().items()
    }
    integers = model.integers if config.rounds else {}
    return UnitResult({layer: integers[layer] for layer in unit.layers if layer in integers}, activations)


def round_unit(
    context: ReconstructionContext, unit: Unit, activations: UnitActivations, config: ReconstructionConfig
) -> float:
    """Round a unit's weights in closed form, learn them, or both, and freeze them; the error with weights rounded to nearest."""
    model, module = context.model, unit.module(context.model.network)
    rounded = modes(model.weight_quantizers(unit.layers) if config.rounds else (), Mode.QUANTIZE)
    with rounded, within(f"the quantized unit {unit.name}"):
        error_before = unit_error(context, unit, activations)
        if config.gptq:
            layers = {name: model.layer(name) for name in unit.layers if name in model.weight_layers()}
            given, seed = next(iter(activations.inputs.values())), derive_seed(context.seed, unit.name)
            batch = context.compute.batch
            round_layers(module, layers, model.context, given, config.gptq, batch=batch, seed=seed)
        if config.learns:
            learn_unit(context, unit, activations, config)
    for layer in unit.layers:
        if config.rounds and layer in model.weight_layers():
            model.freeze(layer)
    return error_before


def learn_unit(
    context: ReconstructionContext, unit: Unit, activations: UnitActivations, config: ReconstructionConfig
) -> None:
    """Learn one unit of the quantized network, whose earlier units are learned; its weights end rounded up or down."""
    model, seed, processes = context.model, derive_seed(context.seed, unit.name), context.compute.processes
    module, device = unit.module(model.network), device_of(model)
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
    model, compute, module = context.model, context.compute, unit.module(context.model.network)
    inputs, exact = next(iter(activations.inputs.values())), activations.outputs
    if replay and replay.holds(exact):
        outputs = run_unit(module, model.context, inputs, compute.batch, compute.storage(4))
        replay.add(module, outputs)
        outputs = outputs.thinned(ERROR_SAMPLES)
    else:
        outputs = run_unit(module, model.context, inputs.thinned(ERROR_SAMPLES), compute.batch, compute.storage())
    return error_of(outputs, exact.thinned(ERROR_SAMPLES), device_of(model))


def error_of(outputs: TensorTree, exact: TensorTree, device: torch.device) -> float:
    """Mean squared error of outputs over the variance of the exact ones, averaged over the outputs."""
    both = (pytree.tree_leaves(tree.structure(tree.tensors)) for tree in (outputs, exact))
    pairs = [(x.to(device), y.to(device, x.dtype)) for x, y in zip(*both, strict=True) if has_samples(x)]
    sizes = [((x - y).square().mean(), y.var(correction=0)) for x, y in pairs]
    errors = [float(relative(*size, "the outputs of a unit")) for size in sizes]
    return sum(errors) / len(errors)


def save_unit(
    context: ReconstructionContext, unit: Unit, config: ReconstructionConfig, errors: tuple[float, float], start: float
) -> None:
    """Save and report a unit that was begun at `start`, with its errors before and after.

    Args:
        context: of the phase.
        unit: that is finished.
        config: what was learned.
        errors: before and after.
        start: by the clock of `time.perf_counter`.
    """
    weights = sum(context.structure.layers[layer].weights for layer in unit.layers)
    size = (unit.name, unit.kind.value, len(unit.layers), weights)
    report = UnitReport(*size, *errors, time.perf_counter() - start, peak_memory_mib())
    context.checkpointer.put(unit.name, unit_result(context.model, unit, config), report)
    context.progress.on_unit_end(unit.name, report)
