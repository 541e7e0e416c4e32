"""Signed bytes represent the same weight as the simulation."""

from typing import Any

import pytest
import torch

from tests.helpers.deployed import weight
from tfmq_exp.deploy.weight_tables import NotRepresentableError, signed_weight, split_in_two
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec

CASES = [
    (2, "affine", 1, True),
    (4, "affine", 0, True),
    (4, "affine", 15, True),
    (7, "affine", 127, True),
    (8, "symmetric", 0, True),
    (8, "affine", 128, True),  # code minus zero point happens to fit
    (8, "affine", 3, False),
    (8, "affine", 250, False),
    (4, "affine", 300, False),  # outside its own grid
    (4, "affine", -200, False),
]


@pytest.mark.parametrize(("bits", "scheme", "zero_point", "exact"), CASES)
def test_the_same_real_numbers(bits: int, scheme: Any, zero_point: int, exact: bool) -> None:
    given = weight(bits, scheme, zero_point)
    found = signed_weight(given)
    assert found.exact == exact
    assert int(found.stored.max()) < 2**bits
    real = found.scale[:, None, None, None] * (found.signed.float() + found.offset[:, None, None, None])
    assert torch.equal(real, given.dequantize())
    assert torch.allclose(found.sums, given.dequantize().double().flatten(1).sum(1).float(), rtol=1e-6)


def test_halves_add_up_and_no_pair_of_them_overflows() -> None:
    signed = torch.arange(-128, 128, dtype=torch.int8).reshape(256, 1)
    low, high = split_in_two(signed).split(256)
    assert torch.equal(low.int() + high.int(), signed.int())
    assert 2 * 255 * int(split_in_two(signed).int().abs().max()) < 2**15


def test_one_scale_for_the_whole_tensor() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(4, 4)
    given = QuantizedWeight(codes, QParams(torch.tensor([[0.5]]), torch.tensor([[7.0]])), QuantSpec(4, "affine"))
    found = signed_weight(given)
    assert found.scale.tolist() == [0.5] * 4
    assert torch.equal(0.5 * found.signed.float(), given.dequantize())


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(NotRepresentableError, match=r"zero point of 2\.5 is no integer"):
        signed_weight(weight(4, "affine", 2.5))
    codes = torch.zeros(4, 6, dtype=torch.uint8)
    by_input = QParams(torch.ones(1, 6), torch.zeros(1, 6))
    with pytest.raises(NotRepresentableError, match="6 weight scales for 4 output channels"):
        signed_weight(QuantizedWeight(codes, by_input, QuantSpec(4, "affine", axis=1)))
