"""The finite set of conditions: places of rows, what counts as the same, and what is refused."""

import pytest
import torch

from tfmq_exp.denoisers.temporal import distinct
from tfmq_exp.quant.condition_set import ConditionSet

G = torch.Generator().manual_seed(0)
POOLED = torch.randn(5, 2, 3, generator=G)
LABELS = torch.tensor([3, 1000, 1001, 7, 3])


def test_rows_are_found_whatever_their_order() -> None:
    known = ConditionSet({"label": LABELS[:4], "pooled": POOLED[:4]})
    order = torch.tensor([2, 0, 3, 3, 1])
    assert known.index({"pooled": POOLED[order], "label": LABELS[order], "other": POOLED}).tolist() == order.tolist()


def test_real_numbers_may_differ_in_their_last_bits_and_whole_ones_may_not() -> None:
    known = ConditionSet({"label": LABELS[1:2], "pooled": POOLED[:1]})
    near = POOLED[:1] * (1 + 1e-6)
    assert known.index({"label": LABELS[1:2], "pooled": near}).tolist() == [0]
    with pytest.raises(ValueError, match=r"label 1001; pooled .*, \.\.\.\) for which no temporal features are stored"):
        known.index({"label": LABELS[2:3], "pooled": near})
    with pytest.raises(ValueError, match="row 1 has a condition"):
        known.index({"label": LABELS[[1, 1]], "pooled": torch.cat([near, POOLED[:1] * 1.01])})


def test_rows_of_all_arguments_belong_together() -> None:
    known = ConditionSet({"label": torch.tensor([0, 1]), "size": torch.tensor([8.0, 16.0])})
    with pytest.raises(ValueError, match="label 0; size 16"):
        known.index({"label": torch.tensor([0]), "size": torch.tensor([16.0])})


@pytest.mark.parametrize(
    "wrong", [{}, {"a": LABELS, "b": LABELS[:2]}, {"a": LABELS[:0]}], ids=["none", "lengths", "no rows"]
)
def test_sets_that_are_none(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="a row for each condition"):
        ConditionSet(wrong)


def test_conditions_of_another_shape_and_missing_ones_are_named() -> None:
    known = ConditionSet({"pooled": POOLED})
    with pytest.raises(ValueError, match=r"shape \(3, 2\) is none of \(2, 3\)"):
        known.index({"pooled": POOLED.mT})
    with pytest.raises(ValueError, match="pooled is not given"):
        known.index({"label": LABELS})


def test_distinct_keeps_the_first_of_equals_in_their_order() -> None:
    rows = {"label": torch.tensor([5, 2, 5, 2, 9]), "size": torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0])}
    assert {name: value.tolist() for name, value in distinct(rows).items()} == {
        "label": [5, 2, 2, 9],
        "size": [1, 1, 2, 0],
    }
    assert distinct({}) == {}
