"""Chains of blocks, by the identity of tensors; and streams of activations, which are written over."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.structure import Kind
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import SpillAllocator
from tfmq_exp.reconstruction.blocks.chain import FromFirst, FromOutput, read_segments
from tfmq_exp.reconstruction.blocks.segment_inputs import SegmentInputs
from tfmq_exp.reconstruction.units import Unit


class Block(nn.Module):
    """(text, image, constant) -> (text, image), in which the text may be returned as it came."""

    def __init__(self, factor: float, same_text: bool = False) -> None:
        super().__init__()
        self.factor, self.same_text = nn.Parameter(torch.tensor(factor), requires_grad=False), same_text

    def forward(self, image: Tensor, text: Tensor, *, temb: Tensor, ids: Any = None) -> tuple[Tensor, Tensor]:
        new = self.factor * image + text + temb[:, None]
        return (text if self.same_text else text - image), new


class Net(nn.Module):
    """Blocks one after the other, with what `kind` names in between."""

    def __init__(self, kind: str, same_text: bool = False) -> None:
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(Block(1.0 + i, same_text) for i in range(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        image, text, temb = hidden_states + 1, hidden_states * 2, timestep.float()[:, None].expand(-1, 3)
        first = image
        for i, block in enumerate(self.blocks):
            if i == 2 and self.kind == "join":
                image = image + 1
            if i == 2 and self.kind == "view":
                temb = temb[:, :]
            if i == 3 and self.kind == "skip":
                text = self.kept
            if i == 3 and self.kind == "reread":
                text = first
            text, image = block(image, text, temb=temb, ids=7)
            if i == 1:
                self.kept = text
        return image + text


def units(kind: Kind = Kind.TRANSFORMER) -> list[Unit]:
    return [Unit(f"blocks.{i}", kind, (), "denoiser", lambda net, i=i: net.blocks[i]) for i in range(4)]


def data(samples: int = 5) -> CalibrationSet:
    rows = torch.arange(samples)
    x = torch.randn(samples, 2, 3, generator=torch.Generator().manual_seed(0))
    return CalibrationSet(x, rows + 1, rows, rows, first_argument="hidden_states")


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("chain", [4]), ("join", [2, 2]), ("view", [2, 2]), ("skip", [2, 2]), ("reread", [4])],
)
def test_segments_end_where_something_runs_in_between_or_an_output_is_read_again(kind: str, lengths: list[int]) -> None:
    segments = read_segments(Net(kind), units(), data())
    assert [len(segment.links) for segment in segments] == lengths


def test_sources_of_leaves() -> None:
    (segment,) = read_segments(Net("chain"), units(), data())
    # (args, kwargs) of the first: image, text, ids or temb by name; outputs: text, image
    image, text, *named = segment.links[1].sources
    assert (image, text) == (FromOutput(1), FromOutput(0))
    assert 7 in named
    assert [source for source in named if source != 7] == [FromFirst(next(iter(segment.constants)))]
    assert len(segment.constants) == 1


def test_modules_that_are_no_blocks_stay_alone() -> None:
    assert [len(s.links) for s in read_segments(Net("chain"), units(Kind.LAYER), data())] == [1] * 4


def outputs_of(net: Net, given: CalibrationSet) -> list[tuple[Tensor, Tensor]]:
    """What every block returns in a pass of the whole network."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: found.append(tuple(x.clone() for x in out)))
        for block in net.blocks
    ]
    net(**given.inputs(torch.device("cpu")))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("same_text", [False, True])
@pytest.mark.parametrize(("kind", "budget"), [("chain", 10**6), ("skip", 10**6), ("reread", 0)])
def test_stream_returns_what_the_network_does(kind: str, budget: int, same_text: bool, keep: bool) -> None:
    net, given = Net(kind, same_text), data()
    expected = outputs_of(net, given)
    segments, storage = read_segments(net, units(), given), SpillAllocator(budget)
    inputs = SegmentInputs(net, net, given, 2, storage, torch.device("cpu"))
    found: list[Any] = []
    for segment in segments:
        stream = inputs.stream(segment, ())
        for link in segment.links:
            before = [x.clone() for x in stream.inputs(link).tensors]
            tree = stream.inputs(link)
            returned = stream.advance(link, link.unit.module(net), TimestepContext([1, 2, 3, 4, 5]), 2, keep=keep)
            found.append([x.clone() for x in returned.tensors])
            assert not keep or all(torch.equal(x, y) for x, y in zip(before, tree.tensors, strict=True))
        inputs.close(segment, stream)
    assert all(
        torch.equal(x, y) for one, other in zip(found, expected, strict=True) for x, y in zip(one, other, strict=True)
    )
    kept = sum(x.nbytes for x in found[-1]) if len(segments[-1].links) > 1 else 0
    assert storage.used == sum(tree.nbytes for _, tree in inputs.finished) >= kept


def test_two_streams_of_one_shape_take_no_more_room_than_their_inputs() -> None:
    net, given, storage = Net("chain"), data(), SpillAllocator(10**6)
    (segment,) = read_segments(net, units(), given)
    stream = SegmentInputs(net, net, given, 2, storage, torch.device("cpu")).stream(segment, ())
    used = storage.used
    for link in segment.links:
        stream.advance(link, link.unit.module(net), TimestepContext([1, 2, 3, 4, 5]), 2)
        assert storage.used == used


def test_released_room_is_used_again_and_files_are_deleted(tmp_path: Any) -> None:
    storage = SpillAllocator(100, tmp_path)
    one, two = (storage.allocate((20,), torch.float32) for _ in range(2))
    assert (storage.used, storage.spilled, len(list(tmp_path.glob("*/*")))) == (160, 80, 1)
    storage.release(two)
    storage.release(one)
    assert (storage.used, storage.spilled, len(list(tmp_path.glob("*/*")))) == (0, 0, 0)
    storage.allocate((25,), torch.float32)
    assert storage.spilled == 0


def test_chain_that_is_read_by_something_else_is_noticed() -> None:
    """Its outputs are not there any more when a later segment's inputs are captured."""

    class Peeking(Net):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            image, text, temb = hidden_states + 1, hidden_states * 2, timestep.float()[:, None].expand(-1, 3)
            for block in self.blocks[:3]:
                text, image = block(image, text, temb=temb)
                self.kept = self.kept + image if block is not self.blocks[0] else image
            return self.blocks[3](self.kept, text, temb=temb)[1]

    net, given = Peeking("chain"), data()
    segments = read_segments(net, units(), given)
    assert [len(s.links) for s in segments] == [3, 1]
    inputs = SegmentInputs(net, net, given, 2, SpillAllocator(10**6), torch.device("cpu"))
    stream = inputs.stream(segments[0], ())
    for link in segments[0].links:
        stream.advance(link, link.unit.module(net), TimestepContext([1, 2, 3, 4, 5]), 2)
    inputs.close(segments[0], stream)
    with pytest.raises((RuntimeError, NotImplementedError)):
        inputs.stream(segments[1], ())
