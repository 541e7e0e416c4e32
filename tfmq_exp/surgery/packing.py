"""Integer codes of any bit-width up to 8, packed into bytes."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes one after the other with `bits` bits each, most significant bit first, zero bits at the end."""
    unpacked = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(unpacked))


def unpack(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
    """The inverse of `pack`.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    count = int(np.prod(shape))
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    rows = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    codes = np.packbits(rows, axis=1)[:, 0] >> (8 - bits)
    return torch.from_numpy(codes.reshape(shape).copy())
