"""Reconstruction of a quantized network, unit by unit, with passes of the whole network."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfmq_exp.core.finite import within
from tfmq_exp.reconstruction.capture import (
    Capture,
    UnitActivations,
    groups_within,
    run_unit,
    sample_bytes,
    shared_inputs,
)
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.output_replay import OutputReplay
from tfmq_exp.reconstruction.temporal_inputs import temporal_inputs
from tfmq_exp.reconstruction.unit_learning import is_learnable, round_unit, save_unit, unit_error
from tfmq_exp.reconstruction.units import Origin, Unit


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
    replays = config.cache == "float32" and not len(context.data.extremes())
    replay = OutputReplay(compute.cache_bytes // 4 if replays else 0)
    driven = [unit for unit in remaining if unit.driver == "denoiser"]
    shared = shared_inputs(context.float_network, driven, context.data) if driven else {}
    for unit, activations in capture_float_units(context, remaining, config, shared):
        start, module = time.perf_counter(), unit.module(model.network)
        inputs: dict[Origin, Any] = dict.fromkeys(config.inputs.origins, activations.inputs.get("float"))
        if captured := unit.driver == "denoiser" and "quantized" in inputs:
            with replay.active(compute.batch), within(f"the inputs of {unit.name} in the quantized network"):
                capture = Capture(context.data, compute.batch, storage)
                inputs["quantized"] = capture.inputs(model, module, shared[unit.name])
        activations = activations._replace(inputs=inputs)
        error_before = round_unit(context, unit, activations, config)
        error_after = unit_error(context, unit, activations, replay if captured else None)
        storage.clear()
        save_unit(context, unit, config, (error_before, error_after), start)
        del activations, inputs  # the pass that captures the next units needs the room


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
    shared: Mapping[str, Sequence[bool]] | None = None,
) -> Iterator[tuple[Unit, UnitActivations]]:
    """Each unit with its activations in the float network; one pass captures as many units as fit into half of the cache."""
    network, data, compute = context.float_network, context.data, context.compute
    with_inputs = "float" in config.inputs.origins
    capture = Capture(data, compute.batch, compute.storage(2, config.cache, of_device=0.5))
    driven = {unit.name: unit for unit in units if unit.driver == "denoiser"}
    sizes = sample_bytes(network, [*driven.values()], data, with_inputs=with_inputs, form=config.cache)
    groups = groups_within({name: sizes[name] * len(data) for name in driven}, capture.storage.capacity)
    activations: dict[str, UnitActivations] = {}
    for unit in units:
        if unit.driver == "timesteps":
            inputs, rows = temporal_inputs(network, data, context.model.context), compute.storage(4, of_device=0.5)
            outputs = run_unit(
                unit.module(network), context.model.context, inputs, max(compute.batch, len(inputs)), rows
            )
            yield (
                unit,
                UnitActivations({"float": inputs}, outputs, config.objective.feature_importance(network, outputs)),
            )
            continue
        if unit.name not in activations:
            capture.storage.clear()
            group = [driven[name] for names in groups if unit.name in names for name in names]
            activations = capture.activations(network, group, shared, with_inputs=with_inputs)
            for name, importance in config.objective.importance(network, group, capture).items():
                activations[name] = activations[name]._replace(importance=importance)
        yield unit, activations.pop(unit.name)
