"""Ranges of activations observed block by block, in a network whose weights are not in memory."""

from collections.abc import Callable
from functools import partial

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.reconstruction.blocks.chain import read_segments
from tfmq_exp.reconstruction.blocks.segment_inputs import SegmentInputs, run_up_to
from tfmq_exp.reconstruction.blocks.stored_weights import LoadedParts, outline_of
from tfmq_exp.reconstruction.capture import shared_inputs
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.units import Blockwise


def observe_blocks(
    context: ReconstructionContext, data: CalibrationSet, batch: int, progress: Callable[[int, int], None]
) -> None:
    """Show the set to the observing quantizers of one block after the other, in the order and batches in which it is given.

    Every quantizer sees what it would see in passes of the whole network: it observes while its block runs, and is off in the
    passes that capture what a segment reads. A layer that also runs outside of its block, as DiT's first embedder does, is seen
    in the block alone. Integer weights come from the unit checkpoints in `context.stored`; weights that
    no unit has learned are rounded to nearest.

    Args:
        context: of the phase.
        data: calibration set.
        batch: samples of a forward pass.
        progress: called with the number of blocks done, and of all.
    """
    model, compute, stored = context.model, context.compute, context.stored
    known = stored.integers.layers() if stored else frozenset[str]()
    outline, units = (
        outline_of(context.float_network, stored),
        Blockwise()(context.structure, frozenset(context.structure.layers)),
    )
    parts = LoadedParts(model, outline, (), stored, compute.device, known, {*known})
    segments, shared = read_segments(outline, units, data), shared_inputs(outline, units, data)
    inputs = SegmentInputs(model, model.network, data, batch, compute.storage(of_device=0.5), compute.device)
    done = 0
    for i, segment in enumerate(segments):
        first = segment.units[0]
        run, off = (
            partial(run_up_to, first, segments[:i], data),
            modes(model.activation_quantizers().values(), Mode.OFF),
        )
        with parts.loaded(parts.parameters_of(run)), off:
            stream = inputs.stream(segment, shared[first.name])
        for link in segment.links:
            with parts.loaded(parts.parameters_inside(link.unit)):
                stream.advance(link, link.unit.module(model.network), model.context, batch)
            progress(done := done + 1, len(units))
        inputs.close(segment, stream)
