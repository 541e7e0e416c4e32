"""Precision of products: as named inside the block, as before after it."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from tfmq_exp.core.precision import PRECISIONS, Precision, products_in

CPU = torch.device("cpu")


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_have_the_precision_that_is_named(precision: Precision) -> None:
    expected = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    x = torch.randn(4, 4)
    with products_in(precision, CPU):
        assert (x @ x).dtype is expected
    assert (x @ x).dtype is torch.float32


@pytest.fixture
def restored() -> Iterator[None]:
    before = tf32()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True)])
def test_tf32_is_on_inside_alone_also_after_an_error(before: tuple[bool, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    for precision, inside in (("tf32", (True, True)), ("float32", before), ("bfloat16", before)):
        seen = []
        with suppress(KeyError), products_in(precision, CPU):
            seen.append(tf32())
            raise KeyError
        assert [*seen, tf32()] == [inside, before]
