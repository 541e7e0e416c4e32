"""Learning of one unit: what it can learn, the training itself, and its result."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tfmq_exp.core.distributed import concatenated
from tfmq_exp.core.finite import DivergedError
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.quant.quantizers import AffineQuantizer
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.reconstruction.activation_cache import RandomBatches, TensorTree
from tfmq_exp.reconstruction.callbacks import LossCallback, UnitResult
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.inputs import Origin
from tfmq_exp.reconstruction.module import BlockReconstruction, ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


class UnitData(NamedTuple):
    """Data that a unit learns from, for all calibration samples.

    Args:
        inputs: by the network in which they were captured.
        targets: outputs of the float unit.
        importance: weights of the elements of the targets, if the objective has any.
    """

    inputs: dict[Origin, TensorTree]
    targets: TensorTree
    importance: TensorTree | None


def quantizers_of(model: QuantizedUNet, unit: Unit, config: ReconstructionConfig) -> dict[str, AffineQuantizer]:
    """Activation quantizers of a unit that the config learns."""
    found = model.activation_quantizers_in(unit.name, unit.layers) if config.scales else {}
    return {
        name: quantizer for name, quantizer in found.items() if any(True for _ in quantizer.scale_provider.trainable())
    }


def is_learnable(model: QuantizedUNet, unit: Unit, config: ReconstructionConfig) -> bool:
    """Whether a unit has weights or scales that the config learns."""
    weights = set(unit.layers).intersection(model.weight_layers()) if config.rounding else set()
    return bool(weights or quantizers_of(model, unit, config))


def learn_unit(context: ReconstructionContext, unit: Unit, data: UnitData, config: ReconstructionConfig) -> None:
    """Learn one unit; its weights end rounded up or down.

    Args:
        context: networks, resources and seed.
        unit: of the quantized network, whose earlier units are learned.
        data: its inputs and the float unit's outputs for all calibration samples.
        config: objective, iterations, and what is learned.

    Raises:
        DivergedError: a loss or a learned number is not finite.
    """
    model, seed, processes = context.model, derive_seed(context.seed, unit.name), context.compute.processes
    module, device = unit.module(model.unet), next(model.parameters()).device
    samples = TensorTree.of(
        {
            "inputs": {origin: tree.whole for origin, tree in data.inputs.items()},
            "targets": data.targets.whole,
            "importance": data.importance.whole if data.importance else None,
        }
    )
    roundings = (
        [rounding for layer in unit.layers for rounding in model.learn_rounding(layer)] if config.rounding else []
    )
    sources = [quantizer.scale_provider for quantizer in quantizers_of(model, unit, config).values()]
    quantizers = list(model.activation_quantizers_in(unit.name, unit.layers).values())
    task = BlockReconstruction(
        module, model.context, roundings, sources, samples.structure, config, seed=seed, processes=processes
    )
    batches = RandomBatches(samples.tensors, config.batch, config.iterations, seed)
    trainer = context.compute.trainer(max_epochs=1, callbacks=[LossCallback(context.progress, unit.name)])
    with trainable_parameters(sources, seed), config.inputs.learning_context(quantizers):
        trainer.fit(task, batches)
    module.to(device)
    learned = concatenated([x.detach() for x in task.learned()])
    processes.check_same(f"what {unit.name} has learned", learned)
    if not bool(learned.isfinite().all()):  # a NaN would be rounded down like any other number
        last = config.iterations
        raise DivergedError(f"the unit {unit.name}", last, last, math.nan, config.learning_rates)
    for rounding in roundings:
        rounding.harden()


@contextmanager
def trainable_parameters(sources: Sequence[ScaleProvider], seed: int) -> Iterator[None]:
    """Let scales learn (with their dropout), with random numbers from the seed."""
    parameters = [parameter for source in sources for parameter in source.trainable()]

    def set_training(training: bool) -> None:
        for source in sources:
            source.train(training)
        for parameter in parameters:
            parameter.requires_grad_(training)

    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        set_training(True)
        try:
            yield
        finally:
            set_training(False)


def freeze_unit(model: QuantizedUNet, unit: Unit) -> None:
    """Turn the weights of a unit into integers."""
    layers = model.weight_layers()
    for layer in unit.layers:
        if layer in layers:
            model.freeze(layer)


def unit_result(model: QuantizedUNet, unit: Unit, config: ReconstructionConfig) -> UnitResult:
    """Learned integer weights and activation quantizers of a unit, for its checkpoint."""
    activations = {
        f"{name}.{key}": value.detach().clone()
        for name, quantizer in quantizers_of(model, unit, config).items()
        for key, value in quantizer.state_dict().items()
    }
    integers = model.integers if config.rounding else {}
    return UnitResult({layer: integers[layer] for layer in unit.layers if layer in integers}, activations)
