"""One weight times what comes in, in three small formats, by torchao's matrix products.

With c - z for a weight's code minus its zero point and s_w for its channel's scale:

    int8  the codes of both operands, the simulation's own: the sums are exact, only their scaling is rounded
    fp8   c - z as e4m3, which is exact up to 16 in magnitude; inputs as e4m3 too, scaled by the largest of each row
    int4  codes packed by four bits, from which the kernel forms c - z exactly; inputs as bfloat16

The grid of a layer's inputs is that of int8 alone. fp8 and int4 leave it out, and round their sums to bfloat16.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchao.float8.inference import Float8MMConfig
from torchao.kernel.intmm import safe_int_mm
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Float8Tensor, Int4TilePackedTo4dTensor
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

from tfmq_exp.deploy.activations import Grid, StepGrid
from tfmq_exp.deploy.sites import Piece, Site
from tfmq_exp.deploy.weights import SignedWeight

INT8_ROWS, INT8_STEP = 17, 8  # CUDA's kernel takes more than 16 rows, and multiples of 8 along the other two sizes
FP8_STEP = 16
FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max
FP8_FLOOR = 1e-12  # of a row's largest magnitude: torchao divides by it, also where all of the row is zero
INT4_BITS = 4
INT4_GROUP, INT4_IN, INT4_OUT = 256, 1024, 16  # kernels scale groups along the inputs; torchao pads those to 1024
INT4_MIDDLE = 8  # the kernels read a code as (code - 8) scale + zero
BF16_INTEGERS = 256  # up to here bfloat16 has all of them


class Product(Protocol):
    """One group of input channels times its part of the weight, without bias.

    Args:
        piece: the two.
        axis: where `x` has its channels, 1 or -1; other dimensions behind the batch are places, all multiplied alike.
        device: of the kernel.
    """

    capability: ClassVar[tuple[int, int]]  # of the oldest GPU that has the kernel
    no_convolution: ClassVar[str]  # why convolutions are left out

    def __init__(self, piece: Piece, axis: int, device: torch.device) -> None: ...

    def __call__(self, x: Float[Tensor, "batch *rest"], steps: Int[Tensor, "batch"]) -> Float[Tensor, "places out"]:
        """In float32; `steps` says at which sampling step each row of the batch is."""
        ...

    @staticmethod
    def obstacle(site: Site) -> str:
        """Why the numbers of a layer do not go into the format; empty where they do."""
        ...

    @staticmethod
    def remark(site: Site) -> str:
        """What becomes of its operands, where they are not the simulation's."""
        ...


class Int8Product:
    """y = s_w s_x (q W - z sum W) + o s_w sum W, the bracket in 32-bit integers.

    Codes are stored less 128, their zero point too. Sums stay inside 32 bits up to 33 000 channels.
    """

    capability: ClassVar[tuple[int, int]] = (7, 5)
    no_convolution: ClassVar[str] = "torchao has no integer convolution"

    def __init__(self, piece: Piece, axis: int, device: torch.device) -> None:
        assert piece.weight is not None
        assert piece.grid is not None
        weight, grid = piece.weight, piece.grid
        signed, offset = weight.signed.flatten(1), weight.offset.to(torch.int32)
        self.size, self.axis = len(signed), axis
        self.matrix = padded(signed, INT8_STEP, INT8_STEP).T.contiguous().to(device)
        total = signed.sum(1, dtype=torch.int32) + offset * signed.shape[1]
        self.total, self.real_total = total.to(device), weight.sums.to(device)
        self.offset = None if weight.exact else offset.to(device)
        self.scale, self.grid = weight.scale.to(device), on(grid, device)
        lowest = float(grid.lowest.min()) if isinstance(grid, StepGrid) else grid.rule.lowest
        self.shift = lowest - torch.iinfo(torch.int8).min

    def __call__(self, x: Tensor, steps: Tensor) -> Tensor:
        """Rows of the batch may be on different grids, and go through together all the same."""
        grid = self.grid.of_rows(x, steps)
        codes = matrix_of(grid.codes(x).sub_(self.shift).to(torch.int8), self.axis)
        parts = (grid.zero_point - self.shift, grid.unit, grid.offset)
        zero_point, unit, offset = (by_place(part, len(codes)) for part in parts)
        sums = self.multiplied(codes)
        if self.offset is not None:
            sums = sums + codes.sum(1, keepdim=True, dtype=torch.int32) * self.offset
        sums = sums - zero_point.to(torch.int32) * self.total
        return sums * (unit * self.scale) + offset * self.real_total

    def multiplied(self, codes: Tensor) -> Tensor:
        """The kernel itself, in the sizes that CUDA's takes."""
        rows = F.pad(codes, (0, len(self.matrix) - codes.shape[1], 0, max(INT8_ROWS - len(codes), 0)))
        return safe_int_mm(rows, self.matrix)[: len(codes), : self.size]

    @staticmethod
    def obstacle(site: Site) -> str:
        """The same as for other engines of integers."""
        return site.why

    @staticmethod
    def remark(site: Site) -> str:
        """Nothing."""
        return ""


class Fp8Product:
    """y = s_w (e4m3(x) e4m3(c - z)). Weights are cast without their scale, because four bits of mantissa hold integers up to 16."""

    capability: ClassVar[tuple[int, int]] = (8, 9)
    no_convolution: ClassVar[str] = "torchao's fp8 convolution has one scale in all"

    def __init__(self, piece: Piece, axis: int, device: torch.device) -> None:
        assert piece.weight is not None
        weight = piece.weight
        matrix = padded(centred(weight), FP8_STEP, FP8_STEP)
        self.size, self.inner, self.axis = len(weight.scale), matrix.shape[1], axis
        scale = F.pad(weight.scale, (0, len(matrix) - self.size), value=1.0)[:, None]
        self.matrix = Float8Tensor(
            matrix.to(torch.float8_e4m3fn).to(device),
            scale.to(device),
            block_size=[1, self.inner],
            mm_config=Float8MMConfig(use_fast_accum=False),
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(hp_value_lb=FP8_FLOOR),
            kernel_preference=KernelPreference.TORCH,
            dtype=torch.bfloat16,
        )

    def __call__(self, x: Tensor, steps: Tensor) -> Tensor:
        """A scale of its own for every row of the matrix, whatever the step."""
        return F.linear(bf16_rows(x, self.axis, self.inner), self.matrix)[:, : self.size].float()

    @staticmethod
    def obstacle(site: Site) -> str:
        """A float weight, or one beyond the format's end."""
        weights = integer_weights(site)
        largest = largest_of(map(centred, weights))
        if largest > FP8_LARGEST:
            return f"a weight of {largest:g} steps; e4m3 ends at {FP8_LARGEST:g}"
        return "" if weights else site.why

    @staticmethod
    def remark(site: Site) -> str:
        """Whether the weight is exact; the inputs never are."""
        matrices = [centred(weight) for weight in integer_weights(site)]
        exact = all(torch.equal(matrix.to(torch.float8_e4m3fn).float(), matrix) for matrix in matrices)
        return f"weights {'exact' if exact else 'rounded'} in e4m3; inputs e4m3 by row, not on their grid"


class Int4Product:
    """y = s_w (bf16(x) (c - z)), the product rounded to bfloat16 before s_w.

    The kernels' groups have a scale and a zero in bfloat16 and read a code as (c - 8) scale + zero. All groups of a channel
    get 1 and 8 - z, which bfloat16 holds exactly, and s_w multiplies the sum in float32; in the kernel it would lose
    sixteen of its bits.
    """

    capability: ClassVar[tuple[int, int]] = (8, 0)
    no_convolution: ClassVar[str] = "torchao has no integer convolution"

    def __init__(self, piece: Piece, axis: int, device: torch.device) -> None:
        assert piece.weight is not None
        weight = piece.weight
        codes = padded(weight.stored.flatten(1).to(torch.int32), INT4_OUT, INT4_IN)
        self.size, self.inner, self.axis = len(weight.scale), codes.shape[1], axis
        self.scale = weight.scale.to(device)
        zero = F.pad(zero_of(weight), (0, len(codes) - self.size))
        pairs = torch.stack([torch.ones_like(zero), zero], dim=1).bfloat16()
        groups = pairs.expand(self.inner // INT4_GROUP, -1, -1).contiguous().to(device)
        kind, packed = packed_int4(codes, device)
        self.matrix = kind(packed, groups, [1, INT4_GROUP], codes.shape)

    def __call__(self, x: Tensor, steps: Tensor) -> Tensor:
        """The same at all steps."""
        return F.linear(bf16_rows(x, self.axis, self.inner), self.matrix)[:, : self.size].float() * self.scale

    @staticmethod
    def obstacle(site: Site) -> str:
        """A float weight, one of more bits, or a zero point that the kernel would round."""
        weights = integer_weights(site)
        if bits := max((weight.bits for weight in weights if weight.bits > INT4_BITS), default=0):
            return f"weights of {bits} bits; int4 holds {INT4_BITS}"
        if (far := largest_of(map(zero_of, weights))) > BF16_INTEGERS:
            return f"a weight zero point {far:g} codes from the middle; the kernel's bfloat16 holds {BF16_INTEGERS}"
        return "" if weights else site.why

    @staticmethod
    def remark(site: Site) -> str:
        """The same for all layers."""
        return "weights exact; inputs bf16, not on their grid"


def padded(x: Shaped[Tensor, "rows columns"], rows: int, columns: int) -> Shaped[Tensor, "more_rows more_columns"]:
    """Zeros below and to the right, up to multiples of the two numbers."""
    return F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def matrix_of(x: Shaped[Tensor, "batch *rest"], axis: int) -> Shaped[Tensor, "places channels"]:
    """Channels last, everything else in one."""
    return x.movedim(axis, -1).flatten(0, -2)


def bf16_rows(x: Float[Tensor, "batch *rest"], axis: int, columns: int) -> Float[Tensor, "places columns"]:
    """What the kernels of fp8 and int4 take, with zeros up to their width."""
    rows = matrix_of(x, axis).bfloat16()
    return F.pad(rows, (0, columns - rows.shape[1]))


def by_place(part: Float[Tensor, "batch"], places: int) -> Float[Tensor, "places 1"]:
    """One number per row of the batch, repeated for all of its places."""
    return part.repeat_interleave(places // len(part))[:, None]


def on(grid: Grid, device: torch.device) -> Grid:
    """A table on another device; a grid that follows from the tensor is where its model is."""
    return StepGrid(*(part.to(device) for part in grid.parts)) if isinstance(grid, StepGrid) else grid


def integer_weights(site: Site) -> Sequence[SignedWeight]:
    """The parts of a layer's weight; none unless all of them are integer."""
    found = [piece.weight for piece in site.pieces if piece.weight]
    return found if len(found) == len(site.pieces) else ()


def largest_of(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude in any of them."""
    return max((float(tensor.abs().max()) for tensor in tensors), default=0.0)


def centred(weight: SignedWeight) -> Float[Tensor, "out in"]:
    """Codes minus zero points."""
    return weight.signed.flatten(1).float() + weight.offset[:, None]


def zero_of(weight: SignedWeight) -> Float[Tensor, "out"]:
    """8 - z, as the kernels add it."""
    return INT4_MIDDLE - weight.shift + weight.offset


def packed_int4(codes: Int[Tensor, "out in"], device: torch.device) -> tuple[Any, Tensor]:
    """The kind of weight that torchao has for a device, and the codes in that one's order."""
    if device.type == "cpu":
        return Int4OpaqueTensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous().to(device)
    return Int4TilePackedTo4dTensor, torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
