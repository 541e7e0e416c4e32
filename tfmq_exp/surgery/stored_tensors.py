"""The tensors of a quantized model as its file has them: codes packed to their bit-width, ranges, and what stayed float."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.surgery.manifest import inside, stored_integers
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


class StoredPart(NamedTuple):
    """A tensor of the model that is in its file: its name there, how it is stored, its integers, and the tensor itself."""

    key: str
    kind: Literal["codes", "scale", "zero_point", "float"]
    spec: QuantSpec | None
    value: Tensor


def stored_parts(model: QuantizedNetwork) -> Iterator[StoredPart]:
    """All tensors of the file: integers, scales of activations, and what stayed float. The weights of integers are not in it."""
    for name, (codes, (scale, zero_point), spec) in stored_integers(model).items():
        yield StoredPart(f"{name}/codes", "codes", spec, codes)
        yield StoredPart(f"{name}/scale", "scale", spec, scale)
        if spec.scheme == "affine":  # a zero point that is always 0 is not stored
            yield StoredPart(f"{name}/zero_point", "zero_point", spec, zero_point)
    if model.context.conditions is not None:
        for name, value in model.context.conditions.rows.items():
            yield StoredPart(f"conditions/{name}", "float", None, value)
    quantizers, frozen = model.activation_quantizers(), model.integers
    for name, quantizer in quantizers.items():
        for key, value in quantizer.state_dict().items():
            part = key.removeprefix("scale_provider.")
            kind: Any = part if part in ("scale", "zero_point") else "float"
            yield StoredPart(f"activations/{name}/{part}", kind, quantizer.spec, value)
    elsewhere = (*(f"{name}." for name in quantizers), *(f"{name}.integers." for name in frozen))
    weights = {f"{name}.weight" for name in frozen}
    for name, value in model.network.state_dict().items():
        if name not in weights and not name.startswith(elsewhere):
            yield StoredPart(f"float/{name}", "float", None, value)


def to_stored(part: StoredPart) -> Tensor:
    """A part of the model as it is written."""
    value = part.value.detach().cpu()
    if part.kind == "codes" and part.spec:
        return pack(value, part.spec.bits)
    if part.kind == "zero_point":  # a byte where all lie in a byte's range
        return value.flatten().to(torch.uint8 if bool(((value >= 0) & (value <= 255)).all()) else torch.float32)
    # tied quantizers share their memory
    return value.flatten().clone() if part.kind == "scale" else value.clone().contiguous()


def from_stored(part: StoredPart, value: Tensor, outside: Sequence[str]) -> Tensor:
    """The inverse of `to_stored`; ValueError for a tensor that is none. Zero points `outside` the grid are named there."""
    key, spec = part.key, part.spec
    dtypes = {"codes": (torch.uint8,), "zero_point": (torch.uint8, torch.float32)}.get(part.kind, (part.value.dtype,))
    if value.dtype not in dtypes:
        raise ValueError(f"{key!r} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{key!r} has numbers that are not finite")
    if part.kind == "codes" and spec:
        return unpack(value, spec.bits, tuple(part.value.shape))
    if part.kind == "scale" and not bool((value > 0).all()):
        raise ValueError(f"{key!r} must be positive, got {float(value.min()):g}")
    if part.kind == "zero_point" and spec:
        value = value.float()
        if not bool((value == value.round()).all()):
            raise ValueError(f"{key!r} must be integers")
        allowed = key.startswith("weights/") and key.removesuffix("/zero_point") in outside
        if not allowed and not inside(value, spec):
            ends = f"{float(value.min()):g} .. {float(value.max()):g}"
            raise ValueError(f"{key!r} must lie within the grid {spec.qmin} .. {spec.qmax}, got {ends}")
    shape = part.value.shape if part.kind == "float" else part.value.flatten().shape
    if value.shape != shape:
        raise ValueError(f"{key!r} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
    return value.reshape(part.value.shape)


class WrittenTensors(Mapping[str, Tensor]):
    """The tensors of a model's file, each made when it is asked for.

    `missing` gives those that are on the meta device in the model: codes, and what stayed float, by their names in the file.
    """

    def __init__(self, model: QuantizedNetwork, missing: Callable[[str], Tensor]) -> None:
        self.parts = {part.key: part for part in stored_parts(model)}
        self.missing = missing

    def __getitem__(self, name: str) -> Tensor:
        part = self.parts[name]
        return to_stored(part._replace(value=self.missing(name)) if part.value.is_meta else part)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes one after the other with `bits` bits each, most significant bit first, zero bits at the end."""
    unpacked = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(unpacked))


def unpack(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
    """The inverse of `pack`; ValueError where the number of bytes does not fit the shape."""
    count = int(np.prod(shape))
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    rows = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    codes = np.packbits(rows, axis=1)[:, 0] >> (8 - bits)
    return torch.from_numpy(codes.reshape(shape).copy())
