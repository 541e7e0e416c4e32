"""Samples that give every batch one shape, where a network cuts a batch to its longest text."""

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.reconstruction.activation_cache import Shared, without_last


def calibration(words: list[int], lengths: str | None = "mask") -> CalibrationSet:
    """A sample for each number of words, of at most 6."""
    count = len(words)
    mask = torch.arange(6) < torch.tensor(words)[:, None]
    rows = torch.arange(count)
    return CalibrationSet(torch.zeros(count, 1, 2, 2), rows, rows, rows, {"mask": mask}, lengths=lengths)


def test_they_have_the_longest_and_the_shortest_text() -> None:
    data = calibration([3, 5, 2, 4])
    assert data.extremes().tolist() == [1, 2]
    assert data[torch.tensor([3, 0, 3])].extremes().tolist() == [0, 1]


def test_none_are_needed_where_all_batches_have_one_shape() -> None:
    assert calibration([4, 4, 4]).extremes().tolist() == []
    assert calibration([3, 5], lengths=None).extremes().tolist() == []
    assert calibration([3, 5])[slice(0, 0)].extremes().tolist() == []


def test_their_rows_are_left_out_of_what_is_stored() -> None:
    table = Shared(torch.zeros(5))
    rows, frames = torch.arange(5), torch.arange(10)  # three samples and two further ones, of one row and of two
    kept = without_last([rows, frames, table, None], samples=3, further=2)
    assert [kept[0].tolist(), kept[1].tolist()] == [[0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert kept[2] is table
    assert kept[3] is None
    assert without_last(rows, samples=5, further=0) is rows
