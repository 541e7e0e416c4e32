"""Passes of a network that capture what the first unit of a segment reads; chains before it do not run again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.devices import device_of
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.chain import Segment
from tfmq_exp.reconstruction.streams import Stream


@dataclass
class SegmentInputs:
    """Inputs of segments in one network, segment after segment.

    Args:
        network: called with the calibration set.
        units: network that holds the units' modules.
        data: calibration set.
        batch: samples of a forward pass.
        storage: of the streams.
    """

    network: nn.Module
    units: nn.Module
    data: CalibrationSet
    batch: int
    storage: SpillAllocator
    finished: list[tuple[Segment, TensorTree]] = field(
        default_factory=list
    )  # segments of several units, with what the last returned

    def stream(self, segment: Segment, shared: Sequence[bool]) -> Stream:
        """A stream at the beginning of a segment; `shared` are those of its first unit in `shared_inputs`."""
        module = segment.units[0].module(self.units)
        with self.skipped():
            first = Capture(self.data, self.batch, self.storage).inputs(self.network, module, shared)
        return Stream(first, segment.constants, self.storage)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Let finished segments return what they have returned.

        Only the last unit's outputs are read; the others return tensors of the meta device, which cannot be mistaken for
        numbers.
        """
        modules: list[Any] = []
        device = device_of(self.network)
        for segment, returned in self.finished:
            stored = returned.batches(self.batch, device)
            calls = [lambda *_, _outputs=link.outputs, **__: _outputs for link in segment.links[:-1]]
            for unit, call in zip(segment.units, [*calls, lambda *_, _stored=stored, **__: next(_stored)], strict=True):
                module: Any = unit.module(self.units)
                module.forward = call
                modules.append(module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def close(self, segment: Segment, stream: Stream) -> None:
        """End a segment: what its last unit returned is kept where it had several."""
        if len(segment.links) > 1:
            self.finished.append((segment, stream.returned))
        stream.close(keep_outputs=len(segment.links) > 1)
