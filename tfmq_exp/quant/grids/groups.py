"""Groups of consecutive channels with a scale and zero point of their own: weights per output row, activations per token.

Groups are a view with one group along the last axis, against which scale and zero point of shape [..., 1] broadcast, so that
all of `functional` serves them. A group of all channels gives weights per row and activations per token.
"""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.observers import Range, include_zero
from tfmq_exp.quant.spec import QParams, QuantSpec


class Place(Protocol):
    """Maps a range to the scale and zero point of its integers; `qparams_from_range` is one."""

    def __call__(self, lo: Tensor, hi: Tensor, spec: QuantSpec, /) -> QParams: ...


def grouped(x: Float[Tensor, "*rest channels"], size: int | None, rows: int = 1) -> Float[Tensor, "*groups values"]:
    """Tensor with one group along its last axis: [..., channels] becomes [..., channels / size, size].

    `size` None is a group of all channels. With `rows` above 1, that many consecutive rows of the second last axis share their
    groups: [..., rows of groups, channels / size, rows * size].

    Raises:
        ValueError: sizes that do not divide the axes.
    """
    *rest, channels = x.shape
    size = channels if size is None else size
    if size < 1 or channels % size:
        raise ValueError(f"the size of a group must divide the number of channels, {channels}, got {size}")
    if rows == 1:
        return x.reshape(*rest, channels // size, size)
    if not rest or rows < 1 or rest[-1] % rows:
        raise ValueError(f"rows of a group must divide the rows of a tensor of shape {tuple(x.shape)}, got {rows}")
    parts = x.reshape(*rest[:-1], rest[-1] // rows, rows, channels // size, size)
    return parts.transpose(-3, -2).flatten(-2)


def ungrouped(groups: Float[Tensor, "*groups values"], rows: int = 1) -> Float[Tensor, "*rest channels"]:
    """Inverse of `grouped` with the same `rows`."""
    if rows == 1:
        return groups.flatten(-2)
    *rest, values = groups.shape
    return groups.reshape(*rest, rows, values // rows).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def group_range(groups: Float[Tensor, "*groups values"], *, zero: bool = True, joint: bool = False) -> Range:
    """Smallest and largest value of every group, [..., 1]; with `zero` widened to 0, so that 0 has a code.

    `joint`: one range for all rows of the batch, the first axis, at the same place. That is ViDiT-Q's release (thu-nics/ViDiT-Q
    44126bd); results then depend on what else is in the batch.
    """
    axes = (0, -1) if joint else (-1,)
    lo, hi = groups.amin(axes, keepdim=True), groups.amax(axes, keepdim=True)
    return include_zero(lo, hi) if zero else (lo, hi)


def quantize_groups(
    x: Float[Tensor, "*shape"],
    spec: QuantSpec,
    size: int | None = None,
    *,
    zero: bool = True,
    joint: bool = False,
    place: Place = qparams_from_range,
) -> Float[Tensor, "*shape"]:
    """Simulated quantization by min-max ranges of groups: a weight's, or an activation's at run time.

    Dynamic per token and group: Q-DiT (arXiv 2406.17343) and SVDQuant (arXiv 2411.05007). Per token: ViDiT-Q (arXiv 2406.02540).

    Args:
        x: weight [outputs, inputs] or activation [..., tokens, channels]; finite.
        spec: the integers; its axis has no meaning here.
        size: channels of a group, which divide their number; None: all.
        zero: widen ranges to 0.
        joint: one range for all rows of the batch.
        place: from ranges to scales and zero points.
    """
    groups = grouped(x, size)
    q = place(*group_range(groups, zero=zero, joint=joint), spec)
    return ungrouped(fake_quantize(groups, q, spec))
