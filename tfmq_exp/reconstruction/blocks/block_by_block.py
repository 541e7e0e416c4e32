"""Reconstruction block by block: in a chain, the inputs of a block are the stored outputs of the one before it.

A network runs only to capture what the first block of a segment reads. Two streams of activations are kept, float and quantized,
and, where the networks are not in memory, the weights of one block.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from tfmq_exp.core.devices import device_of
from tfmq_exp.core.finite import within
from tfmq_exp.core.memory import give_back_memory
from tfmq_exp.denoisers.loading.meta_network import on_meta
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.blocks.chain import Link, Segment, has_chain, read_segments
from tfmq_exp.reconstruction.blocks.segment_inputs import SegmentInputs, run_up_to
from tfmq_exp.reconstruction.blocks.stored_weights import LoadedParts, outline_of
from tfmq_exp.reconstruction.blocks.streams import Stream
from tfmq_exp.reconstruction.capture import UnitActivations, run_unit, shared_inputs
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.loop import reconstruct, restore_finished
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.temporal_inputs import temporal_inputs
from tfmq_exp.reconstruction.unit_learning import (
    ERROR_SAMPLES,
    error_of,
    is_learnable,
    round_unit,
    save_unit,
    unit_error,
)
from tfmq_exp.reconstruction.units import Origin, Unit

LENGTHS = "texts of different lengths need the whole network's weights in memory: batches are cut to the longest"


def reconstruct_units(context: ReconstructionContext, units: Sequence[Unit], config: ReconstructionConfig) -> None:
    """Learn the rounding of weights, activation scales, or both, unit by unit, see `reconstruct`.

    Where the blocks of a transformer form chains, block by block: the same numbers, with two passes of the network in all. Other
    networks, activations stored in fewer bits, and objectives that need gradients of the whole network take its passes.

    Raises:
        ValueError: data at a timestep outside the finite set; weights that are not in memory with an objective that needs
            gradients of the whole network.
        DivergedError: a loss or a learned number is not finite.
    """
    model, stored = context.model, context.stored
    of_lengths = bool(
        len(context.data.extremes())
    )  # batches that hold more than the samples are not made of stored outputs
    if stored is None and (config.cache != "float32" or config.objective.needs_network or of_lengths):
        reconstruct(context, units, config)
        return
    if of_lengths:
        raise ValueError(LENGTHS)
    if config.objective.needs_network:
        raise ValueError("an objective that weighs outputs by gradients needs the whole network's weights in memory")
    model.context.require(context.data.t.unique().tolist())
    learnable = [unit for unit in units if is_learnable(model, unit, config)]
    learned = frozenset(layer for unit in units for layer in unit.layers) if config.rounds else frozenset[str]()
    known = frozenset[str]() if config.rounds or stored is None else stored.integers.layers()
    driven, outline = (
        [unit for unit in learnable if unit.driver == "denoiser"],
        outline_of(context.float_network, stored),
    )
    segments = read_segments(outline, driven, context.data) if driven else []
    if stored is None and not has_chain(segments):
        reconstruct(context, units, config)
        return
    shared = shared_inputs(outline, driven, context.data) if driven else {}
    networks = model, outline, (context.float_network,)
    parts = LoadedParts(*networks, stored, context.compute.device, learned | known, {*known})
    BlockByBlock(context, config, parts, shared, segments).run(learnable)


@dataclass
class BlockByBlock:
    """A reconstruction block by block.

    Args:
        context: of the phase.
        config: how units learn.
        parts: of both networks, in memory.
        shared: by unit, see `shared_inputs`.
        segments: of the units that the denoiser drives.
    """

    context: ReconstructionContext
    config: ReconstructionConfig
    parts: LoadedParts
    shared: Mapping[str, Sequence[bool]]
    segments: Sequence[Segment]
    inputs: dict[Origin, SegmentInputs] = field(init=False)

    def __post_init__(self) -> None:
        context = self.context
        of_float: dict[Origin, SegmentInputs] = {"float": self.inputs_in(context.float_network, context.float_network)}
        others: dict[Origin, SegmentInputs] = {"quantized": self.inputs_in(context.model, context.model.network)}
        self.inputs = {**of_float, **{o: inputs for o, inputs in others.items() if o in self.config.inputs.origins}}

    def inputs_in(self, network: nn.Module, units: nn.Module) -> SegmentInputs:
        """Inputs of segments in a network, of which half the cache is for."""
        compute = self.context.compute
        storage = compute.storage(2, self.config.cache, of_device=0.5)
        return SegmentInputs(network, units, self.context.data, compute.batch, storage, compute.device)

    def run(self, units: Sequence[Unit]) -> None:
        """Restore what an interrupted run has finished, run it once more for what it returns, and learn the others."""
        remaining = {unit.name for unit in self.restored(units)}
        for unit in units:
            if unit.driver == "timesteps" and unit.name in remaining:
                self.learn_temporal(unit)
                remaining.remove(unit.name)
        for segment in self.segments:
            if remaining:
                self.run_segment(segment, remaining)
                remaining -= {unit.name for unit in segment.units}

    def restored(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units that are still to be learned."""
        context, count = self.context, 0
        if self.parts.stored is None:
            return restore_finished(context, units, self.config)
        context.progress.on_start(len(units))
        while count < len(units) and (result := context.checkpointer.get(units[count].name)) is not None:
            context.model.load_activations(result.activations)
            self.parts.finished.update(result.integers)
            context.progress.on_unit_end(units[count].name, None)
            count += 1
        return units[count:]

    def learn_temporal(self, unit: Unit) -> None:
        """Learn a unit that timesteps drive, with its own layers in memory."""
        context, compute, model = self.context, self.context.compute, self.context.model
        start, inputs = time.perf_counter(), temporal_inputs(context.float_network, context.data, model.context)
        parameters = self.parts.parameters_of(lambda network: unit.module(network)(*on_meta(inputs.whole[1])))
        batch = compute.batch if self.parts.stored else max(compute.batch, len(inputs))
        with self.parts.loaded(parameters, unit.layers):
            view = self.parts.view(unit, parameters)
            targets = run_unit(
                view.module(context.float_network), model.context, inputs, batch, compute.storage(4, of_device=0.5)
            )
            importance = self.config.objective.feature_importance(context.float_network, targets)
            activations = UnitActivations(dict.fromkeys(self.config.inputs.origins, inputs), targets, importance)
            before = round_unit(context, view, activations, self.config)
            self.finish(view, (before, unit_error(context, view, activations)), start)

    def run_segment(self, segment: Segment, remaining: set[str]) -> None:
        """Capture the inputs of the first unit, and run or learn one unit after the other."""
        first, streams = segment.units[0].name, dict[Origin, Stream]()
        before = self.segments[: self.segments.index(segment)]
        run = partial(run_up_to, segment.units[0], before, self.context.data)
        with self.parts.loaded(self.parts.parameters_of(run)):
            for origin, inputs in self.inputs.items():
                with within(f"the inputs of {first} in the {origin} network"):
                    streams[origin] = inputs.stream(segment, self.shared[first])
        for link in segment.links:
            new = link.unit.name in remaining
            with self.parts.loaded(self.parts.parameters_inside(link.unit), link.unit.layers if new else ()):
                self.run_unit(link, streams, new)
        for origin, stream in streams.items():
            self.inputs[origin].close(segment, stream)

    def run_unit(self, link: Link, streams: Mapping[Origin, Stream], new: bool) -> None:
        """Run a unit in both networks, and learn it in between if it is new."""
        context, config, unit = self.context, self.config, link.unit
        model, batch, start = context.model, context.compute.batch, time.perf_counter()
        inputs: dict[Origin, TensorTree] = {origin: streams[origin].inputs(link) for origin in config.inputs.origins}
        with within(f"the outputs of {unit.name} in the float network"):
            module, keep = unit.module(context.float_network), "float" in inputs
            targets = streams["float"].advance(link, module, model.context, batch, keep=keep)
        activations = UnitActivations(inputs, targets)
        before = round_unit(context, unit, activations, config) if new else 0.0
        give_back_memory()  # Lightning's trainer and its module refer to each other, and keep what is as large as the weights
        if "quantized" in streams:
            outputs = streams["quantized"].advance(link, unit.module(model.network), model.context, batch)
            few = outputs.thinned(ERROR_SAMPLES), targets.thinned(ERROR_SAMPLES)
            after = error_of(*few, device_of(model)) if new else 0.0
        else:
            after = unit_error(context, unit, activations) if new else 0.0
        if new:
            self.finish(unit, (before, after), start)

    def finish(self, unit: Unit, errors: tuple[float, float], start: float) -> None:
        """Save a unit, whose weights are integers from now on."""
        save_unit(self.context, unit, self.config, errors, start)
        if self.config.rounds:
            self.parts.finished.update(set(unit.layers).intersection(self.context.model.weight_layers()))
