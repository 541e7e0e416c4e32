"""Formats of cached activations: as they are, or in fewer bytes."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.finite import require_finite

CacheFormat = Literal["float32", "bfloat16", "float16", "int8"]
FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "float16", "int8")


class Bytes(NamedTuple):
    """A tensor as signed bytes, with a scale for each channel of a map, token, or vector of each sample."""

    codes: Int8[Tensor, "samples *rest"]
    scale: Float[Tensor, "samples *rest"]

    @classmethod
    def of(cls, x: Float[Tensor, "samples *rest"]) -> "Bytes":
        """Round to the nearest code; the error of a value is at most 1/254 of the largest one that shares its scale."""
        scale = x.abs().amax(dim=tuple(range(2, x.dim())) if x.dim() > 3 else -1, keepdim=True) / 127
        return cls((x / scale.clamp(min=torch.finfo(x.dtype).tiny)).round().to(torch.int8), scale)

    def decoded(self) -> Float[Tensor, "samples *rest"]:
        """Real values."""
        return self.codes * self.scale


def encode(tree: Any, form: CacheFormat) -> Any:
    """A nested structure with its float tensors in a format; NotFiniteError for a NaN, an infinity, or what float16 cannot hold."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            return x
        found = require_finite(x.detach(), "a tensor on the calibration set")
        if form == "float32":
            return found
        if form == "int8":
            return Bytes.of(found)
        return require_finite(found.to(getattr(torch, form)), f"a tensor on the calibration set, as {form},")

    return pytree.tree_map(leaf, tree)


def decode(tree: Any) -> Any:
    """The structure with its tensors as float32 again."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Bytes):
            return x.decoded()
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x

    return pytree.tree_map(leaf, tree, is_leaf=lambda x: isinstance(x, Bytes))
