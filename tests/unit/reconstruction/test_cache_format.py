"""Formats of cached activations: bytes, errors, and what cannot be stored."""

import pytest
import torch

from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.cache_format import FORMATS, Bytes, CacheFormat, decode, encode

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = ((6, 32), (6, 10, 32), (6, 32, 4, 4))
HALF_STEP = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of the value itself


def samples(shape: tuple[int, ...]) -> torch.Tensor:
    """Values whose size differs from sample to sample and from channel to channel."""
    x = torch.randn(shape, generator=GENERATOR)
    return x * torch.logspace(-3, 3, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_come_back_within_half_a_step(form: CacheFormat, shape: tuple[int, ...]) -> None:
    x = samples(shape)
    found = decode(encode({"x": x, "t": torch.arange(6), "flag": True}, form))
    assert found["flag"] is True
    assert torch.equal(found["t"], torch.arange(6))
    assert found["x"].dtype is torch.float32
    error = (found["x"] - x).abs()
    if form == "int8":
        largest = x.abs().amax(dim=(2, 3) if len(shape) == 4 else -1, keepdim=True)
        assert bool((error <= largest / 254 * (1 + 1e-5)).all())
        assert bool((error > largest / 1000).any())
    else:
        smallest = 2.0**-25 if form == "float16" else 0.0  # below its normal numbers steps are equal
        assert bool((error <= x.abs() * HALF_STEP[form] + smallest).all())


@pytest.mark.parametrize("form", FORMATS)
def test_a_tree_stores_and_selects_in_its_format(form: CacheFormat) -> None:
    x, t = samples((6, 8, 16, 16)), torch.arange(6)
    storage = SpillAllocator(2**20, form=form)
    tree = TensorTree.like((t[:2], (x[:2],), {"scale": 1.0}), 6, storage)
    for start in (0, 2, 4):
        tree.write(start, (t[start : start + 2], (x[start : start + 2],), {"scale": 1.0}))
    rows = torch.tensor([5, 1])
    times, (found,), rest = tree.structure([y[rows] for y in tree.tensors])
    assert torch.equal(times, rows)
    assert rest == {"scale": 1.0}
    torch.testing.assert_close(found, decode(encode(x, form))[rows], rtol=0, atol=0)
    share = (tree.nbytes - 6 * 8) / x.nbytes
    assert share == {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}.get(form, pytest.approx(0.25, rel=0.02))
    assert tree.thinned(3).form == form
    assert len(tree.thinned(3)) == 3


def test_a_constant_of_zero_is_kept() -> None:
    assert torch.equal(Bytes.of(torch.zeros(2, 3)).decoded(), torch.zeros(2, 3))


@pytest.mark.parametrize(("form", "value"), [("float16", 1e6), ("int8", float("nan")), ("bfloat16", float("inf"))])
def test_what_a_format_cannot_hold_is_named(form: CacheFormat, value: float) -> None:
    with pytest.raises(NotFiniteError, match="a tensor on the calibration set"):
        encode(torch.full((2, 2), value), form)
