"""Tensors with several rows for each sample, and those that all samples share."""

import pytest
import torch

from tfmq_exp.reconstruction.activation_cache import (
    Folded,
    Shared,
    SpillAllocator,
    TensorTree,
    fold,
    mark_shared,
    shared_leaves,
    unfold,
)


def test_rows_of_a_sample_are_folded_together_and_back() -> None:
    frames, plain = torch.arange(12.0).reshape(6, 2), torch.arange(2.0)
    tree = ((frames, None), {"plain": plain, "number": torch.tensor(3.0), "count": 6})
    (folded, nothing), further = found = fold(tree, 2)
    assert isinstance(folded, Folded)
    assert torch.equal(folded.rows, frames.reshape(2, 3, 2))
    assert nothing is None
    assert further == {"plain": plain, "number": torch.tensor(3.0), "count": 6}
    (again, _), _ = unfold(found)
    assert torch.equal(again, frames)


@pytest.mark.parametrize("rows", [2, 5])
def test_as_many_rows_as_samples_or_no_multiple_stay_as_they_are(rows: int) -> None:
    x = torch.zeros(rows, 3)
    assert fold([x], 2)[0] is x


def test_folded_rows_of_some_samples_are_theirs() -> None:
    frames = torch.arange(12.0).reshape(6, 2)  # two of each of three samples
    tree = TensorTree.like(fold(frames[:4], 2), 3, SpillAllocator(2**20))
    tree.write(0, fold(frames[:4], 2))
    tree.write(2, fold(frames[4:], 1))
    assert len(tree) == 3
    assert torch.equal(tree.structure([x[torch.tensor([2, 0])] for x in tree.tensors]), frames[[4, 5, 0, 1]])


def test_shared_leaves_are_those_that_do_not_grow() -> None:
    def call(batch: int) -> object:
        return (torch.zeros(batch, 3), torch.zeros(1, 3), None), {
            "rope": [torch.zeros(2, 3)],
            "n": 2,
            "s": torch.tensor(1.0),
        }

    shared = shared_leaves(call(1), call(2))
    assert shared == [False, True, False, True, False, False]
    # a table as long as the batch is none of its rows
    (rows, table, nothing), further = mark_shared(call(2), shared)
    assert isinstance(table, Shared)
    assert isinstance(further["rope"][0], Shared)
    assert nothing is None
    assert isinstance(rows, torch.Tensor)
    again = unfold((rows, table, further))
    assert torch.equal(again[1], torch.zeros(1, 3))
    assert torch.equal(again[2]["rope"][0], torch.zeros(2, 3))


def test_nothing_shared_is_nothing_done() -> None:
    tree = (torch.zeros(2), {"x": None})
    assert mark_shared(tree, [False, False]) is tree
    assert mark_shared(tree, ()) is tree


def test_samples_of_other_shapes_are_refused() -> None:
    tree = TensorTree.like((torch.zeros(1, 4), None), 3, SpillAllocator(2**20))
    with pytest.raises(ValueError, match=r"shapes \[\(5,\)\] where those before had \[\(4,\)\]"):
        tree.write(0, (torch.zeros(1, 5), None))
    with pytest.raises(ValueError, match=r"\[\(4,\), \(4,\)\] where those before had \[\(4,\)\]"):
        tree.write(0, (torch.zeros(1, 4), torch.zeros(1, 4)))
