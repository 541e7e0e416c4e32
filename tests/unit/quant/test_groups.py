"""Groups of channels against loops over them."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from tfmq_exp.quant.grids.groups import group_range, grouped, quantize_groups, ungrouped
from tfmq_exp.quant.spec import QuantSpec


def by_hand(values: list[float], bits: int, scheme: str, extremes: list[float] | None = None) -> list[float]:
    """Values of one range after quantization, in Python's numbers; the range is that of `extremes`, widened to 0."""
    lo, hi = min(0.0, *(extremes or values)), max(0.0, *(extremes or values))
    steps, zero, least = 2**bits - 1, 0, 0
    if scheme == "symmetric":
        least = -(2 ** (bits - 1))
        scale = max(-lo, hi) / (2 ** (bits - 1) - 1)
    elif scheme == "unsigned":
        scale = hi / steps
    else:
        scale = (hi - lo) / steps
        zero = round(-lo / scale) if scale else 0
    if not scale:
        return [0.0 for _ in values]
    return [scale * (min(max(round(v / scale) + zero, least), least + steps) - zero) for v in values]


def values(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 0
    return x


@pytest.mark.parametrize("scheme", ["affine", "symmetric", "unsigned"])
@pytest.mark.parametrize(("bits", "size"), [(2, 3), (4, 4), (8, 12), (4, None)])
def test_weights_and_tokens_are_quantized_group_by_group(bits: int, size: int | None, scheme: str) -> None:
    x = values(2, 5, 12)
    x = x.abs() if scheme == "unsigned" else x
    expected = torch.empty_like(x)
    width = size or 12
    for row in range(2):
        for token in range(5):
            for start in range(0, 12, width):
                group = x[row, token, start : start + width].tolist()
                expected[row, token, start : start + width] = torch.tensor(by_hand(group, bits, scheme))
    spec = QuantSpec(bits, scheme)  # type: ignore[arg-type]
    torch.testing.assert_close(quantize_groups(x, spec, size), expected, rtol=0, atol=1e-6)
    # the same as rows of a weight
    torch.testing.assert_close(quantize_groups(x.flatten(0, 1), spec, size), expected.flatten(0, 1), rtol=0, atol=1e-6)


def test_a_joint_range_is_that_of_all_rows_at_the_same_token() -> None:
    x, spec = values(3, 4, 6), QuantSpec(4)
    expected = torch.empty_like(x)
    for token in range(4):
        together = x[:, token].flatten().tolist()
        for row in range(3):
            expected[row, token] = torch.tensor(by_hand(x[row, token].tolist(), 4, "affine", together))
    torch.testing.assert_close(quantize_groups(x, spec, joint=True), expected, rtol=0, atol=1e-6)


def test_a_row_depends_on_the_others_only_where_ranges_are_joint() -> None:
    x, spec = values(3, 4, 6), QuantSpec(4)
    other = x.clone()
    other[2] *= 10
    assert quantize_groups(x, spec)[:2].equal(quantize_groups(other, spec)[:2])
    assert not quantize_groups(x, spec, joint=True)[:2].equal(quantize_groups(other, spec, joint=True)[:2])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_groups_of_rows_hold_the_block_of_those_rows(rows: int) -> None:
    x = torch.arange(6 * 8.0).reshape(6, 8)
    groups = grouped(x, 4, rows)
    assert groups.shape == (6 // rows, 2, 4 * rows)
    for i in range(6 // rows):
        for j in range(2):
            assert groups[i, j].equal(x[i * rows : (i + 1) * rows, 4 * j : 4 * j + 4].flatten())
    assert ungrouped(groups, rows).equal(x)
    assert ungrouped(grouped(x[None], 4, rows), rows).equal(x[None])


def test_ranges_include_zero_unless_they_need_not() -> None:
    groups = torch.tensor([[1.0, 2.0], [-3.0, -1.0], [-1.0, 1.0]])
    assert [end.flatten().tolist() for end in group_range(groups)] == [[0, -3, -1], [2, 0, 1]]
    assert [end.flatten().tolist() for end in group_range(groups, zero=False)] == [[1, -3, -1], [2, -1, 1]]


@pytest.mark.parametrize("size", [0, -2, 5, 13])
def test_a_size_that_does_not_divide_the_channels_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"divide the number of channels, 12, got {size}"):
        grouped(torch.zeros(2, 12), size)


@pytest.mark.parametrize(("shape", "rows"), [((5, 4), 2), ((4,), 2), ((4, 4), 0)])
def test_rows_that_do_not_divide_the_tensor_are_refused(shape: tuple[int, ...], rows: int) -> None:
    with pytest.raises(ValueError, match=f"got {rows}"):
        grouped(torch.zeros(shape), 2, rows)


def test_unsigned_groups_serve_what_gelu_gives_after_a_shift() -> None:
    """SVDQuant's inputs of the second layer of an MLP: x + 0.171875, codes 0 .. 15."""
    x, shift = gelu(values(6, 16)), 0.171875
    found = quantize_groups(x + shift, QuantSpec(4, "unsigned"), 8) - shift
    without = quantize_groups(x, QuantSpec(4, "symmetric"), 8)
    assert (found - x).square().mean() < 0.5 * (without - x).square().mean()
    below = torch.tensor([[-0.3, 1 - shift]])
    assert quantize_groups(below + shift, QuantSpec(4, "unsigned")).tolist() == [[0.0, 1.0]]
