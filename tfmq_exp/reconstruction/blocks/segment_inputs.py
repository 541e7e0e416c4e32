"""Passes of a network that capture what the first unit of a segment reads; chains before it do not run again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.blocks.chain import Segment
from tfmq_exp.reconstruction.blocks.streams import Stream
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.recorded_calls import StopForward
from tfmq_exp.reconstruction.units import Unit


@contextmanager
def skipped(network: nn.Module, segments: Sequence[tuple[Segment, Callable[[], Any]]]) -> Iterator[None]:
    """Do not run these segments: the second of each pair returns the last unit's outputs for the present batch.

    Others' outputs nothing reads; they are of the meta device, and cannot be mistaken for numbers.
    """
    with ExitStack() as restored:
        for segment, last in segments:
            calls = [*(partial(returning, link.outputs) for link in segment.links[:-1]), partial(calling, last)]
            for unit, call in zip(segment.units, calls, strict=True):
                restored.enter_context(patch.object(unit.module(network), "forward", call))
        yield


def returning(value: Any, *_: Any, **__: Any) -> Any:
    return value


def calling(function: Callable[[], Any], *_: Any, **__: Any) -> Any:
    return function()


@dataclass
class SegmentInputs:
    """Inputs of segments in one network, segment after segment.

    Args:
        network: called with the calibration set.
        units: network that holds the units' modules.
        data: calibration set.
        batch: samples of a forward pass.
        storage: of the streams.
        device: of the network.
    """

    network: nn.Module
    units: nn.Module
    data: CalibrationSet
    batch: int
    storage: SpillAllocator
    device: torch.device
    finished: list[tuple[Segment, TensorTree]] = field(
        default_factory=list
    )  # segments of several units, with what the last returned

    def stream(self, segment: Segment, shared: Sequence[bool]) -> Stream:
        """A stream at the beginning of a segment; `shared` are those of its first unit in `shared_inputs`."""
        module = segment.units[0].module(self.units)
        last = [(before, returned.batches(self.batch, self.device).__next__) for before, returned in self.finished]
        with skipped(self.units, last):
            first = Capture(self.data, self.batch, self.storage, self.device).inputs(self.network, module, shared)
        return Stream(first, segment.constants, self.storage)

    def close(self, segment: Segment, stream: Stream) -> None:
        """End a segment: what its last unit returned is kept where it had several."""
        if len(segment.links) > 1:
            self.finished.append((segment, stream.returned))
        stream.close(keep_outputs=len(segment.links) > 1)


def run_up_to(unit: Unit, before: Sequence[Segment], data: CalibrationSet, outline: nn.Module) -> None:
    """Run a network's copy on the meta device up to a unit, without the chains before it."""
    last = [(segment, partial(returning, segment.links[-1].outputs)) for segment in before if len(segment.links) > 1]
    with skipped(outline, last), patch.object(unit.module(outline), "forward", side_effect=StopForward):
        list(Capture(data[slice(0, 1)], 1, SpillAllocator(0)).forward(outline))
