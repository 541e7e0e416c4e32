"""Products in three small formats by torchao.

With c - z for a weight's code minus its zero point, and s_w for the scale of its channel:

    int8  codes of both operands, those of the simulation: the sums are exact, only their scaling is rounded
    fp8   c - z as e4m3, exact up to 16 in magnitude; inputs as e4m3 too, scaled by the largest of each row
    int4  codes packed by four bits, from which the kernel computes c - z exactly; inputs as bfloat16

Only int8 uses the quantization parameters of the inputs. fp8 and int4 do not, and round their sums to bfloat16.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.kernel.intmm import safe_int_mm
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Float8Tensor, Int4TilePackedTo4dTensor
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

from tfmq_exp.deploy.layers import DeployedLayer, DeployedProduct, Product
from tfmq_exp.deploy.weight_tables import SignedWeight

INT8_ROWS, INT8_STEP = 17, 8  # CUDA's kernel takes more than 16 rows, and multiples of 8 along the other two sizes
FP8_STEP = 16
FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max
FP8_FLOOR = 1e-12  # of a row's largest magnitude: torchao divides by it, also if all of the row is zero
INT4_BITS = 4
INT4_GROUP, INT4_IN, INT4_OUT = 256, 1024, 16  # kernels scale groups along the inputs; torchao pads those to 1024
INT4_MIDDLE = 8  # the kernels read a code as (code - 8) scale + zero
BF16_INTEGERS = 256  # up to here bfloat16 has all of them


class Int8Product(Product):
    """y = s_w s_x (q W - z sum W) + o s_w sum W, the bracket in 32-bit integers; see `Product`.

    Codes are stored less 128, and their zero point too. Sums stay inside 32 bits up to 33 000 channels.
    """

    def __init__(self, product: DeployedProduct, axis: int, device: torch.device) -> None:
        super().__init__()
        assert product.weight is not None
        assert product.input is not None
        weight = product.weight
        signed, offset = weight.signed.flatten(1), weight.offset.to(torch.int32)
        self.size, self.axis, self.input = len(signed), axis, product.input
        self.matrix = padded(signed, INT8_STEP, INT8_STEP).T.contiguous().to(device)
        self.total = (signed.sum(1, dtype=torch.int32) + offset * signed.shape[1]).to(device)
        self.real_total, self.scale = weight.sums.to(device), weight.scale.to(device)
        self.offset = None if weight.exact else offset.to(device)
        self.shift = float(product.input.table.lowest.min()) - torch.iinfo(torch.int8).min

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """Rows with different quantization parameters are computed together."""
        table = self.input.of_rows(x, steps)
        codes = as_matrix(table.codes(x).sub_(self.shift).to(torch.int8), self.axis)
        columns = (table.zero_point - self.shift, table.output_scale, table.offset)
        zero_point, scale, offset = (column.repeat_interleave(len(codes) // len(x))[:, None] for column in columns)
        rows = F.pad(codes, (0, len(self.matrix) - codes.shape[1], 0, max(INT8_ROWS - len(codes), 0)))
        sums = safe_int_mm(rows, self.matrix)[: len(codes), : self.size]
        if self.offset is not None:
            sums = sums + codes.sum(1, keepdim=True, dtype=torch.int32) * self.offset
        sums = sums - zero_point.to(torch.int32) * self.total
        return as_image(sums * (scale * self.scale) + offset * self.real_total, x, self.axis)


class BFloat16Product(Product):
    """y = s_w (bf16(x) W), the product rounded to bfloat16 before s_w; see `Product`.

    Args:
        matrix: W as a tensor subclass of torchao, whose kernel may convert the inputs further.
        scale: s_w; 1 if `matrix` includes it.
        axis: dimension of the channels of the inputs.
    """

    def __init__(self, matrix: Tensor, scale: Float[Tensor, "out"], axis: int) -> None:
        super().__init__()
        self.matrix, self.scale, self.axis = matrix, scale, axis

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        rows = as_matrix(x, self.axis).bfloat16()
        rows = F.pad(rows, (0, self.matrix.shape[1] - rows.shape[1]))
        y = F.linear(rows, self.matrix)[:, : len(self.scale)].float()
        return as_image(y * self.scale, x, self.axis)


def fp8_product(product: DeployedProduct, axis: int, device: torch.device) -> BFloat16Product:
    """Y = s_w (e4m3(x) e4m3(c - z)). Weights are cast without their scale: e4m3 represents all integers up to 16."""
    assert product.weight is not None
    scale, matrix = product.weight.scale, padded(centred(product.weight), FP8_STEP, FP8_STEP)
    weight = Float8Tensor(
        matrix.to(torch.float8_e4m3fn).to(device),
        F.pad(scale, (0, len(matrix) - len(scale)), value=1.0)[:, None].to(device),
        block_size=[1, matrix.shape[1]],
        mm_config=Float8MMConfig(use_fast_accum=False),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(hp_value_lb=FP8_FLOOR),
        kernel_preference=KernelPreference.TORCH,
        dtype=torch.bfloat16,
    )
    return BFloat16Product(weight, torch.ones_like(scale).to(device), axis)


def int4_product(product: DeployedProduct, axis: int, device: torch.device) -> BFloat16Product:
    """Y = s_w (bf16(x) (c - z)).

    The kernels' groups have a scale and a zero in bfloat16. All groups of a channel get 1 and 8 - z, which bfloat16 represents
    exactly, and s_w multiplies the sum in float32; in the kernel it would lose sixteen of its bits.
    """
    assert product.weight is not None
    weight = product.weight
    codes = padded(weight.stored.flatten(1).to(torch.int32), INT4_OUT, INT4_IN)
    zero = F.pad(int4_zero(weight), (0, len(codes) - len(weight.scale)))
    pairs = torch.stack([torch.ones_like(zero), zero], dim=1).bfloat16()
    groups = pairs.expand(codes.shape[1] // INT4_GROUP, -1, -1).contiguous().to(device)
    if device.type == "cpu":
        kind, packed = Int4OpaqueTensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    else:
        two = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous().to(device)
        kind, packed = Int4TilePackedTo4dTensor, torch.ops.aten._convert_weight_to_int4pack(two, 8)
    matrix: Any = kind(packed, groups, [1, INT4_GROUP], codes.shape)
    return BFloat16Product(matrix, weight.scale.to(device), axis)


def fp8_obstacle(weights: Sequence[SignedWeight]) -> str:
    """Reason why weights do not fit e4m3; empty if they do."""
    largest = largest_of(map(centred, weights))
    return f"a weight of {largest:g} steps; e4m3 ends at {FP8_LARGEST:g}" if largest > FP8_LARGEST else ""


def fp8_note(weights: Sequence[SignedWeight]) -> str:
    """Whether the weights are exact; the inputs never are."""
    exact = all(torch.equal(matrix.to(torch.float8_e4m3fn).float(), matrix) for matrix in map(centred, weights))
    return f"weights {'exact' if exact else 'rounded'} in e4m3; inputs e4m3 by row, not on their grid"


def int4_obstacle(weights: Sequence[SignedWeight]) -> str:
    """Reason why weights do not fit four bits, or their zero points the kernel; empty if they do."""
    if (bits := max(weight.bits for weight in weights)) > INT4_BITS:
        return f"weights of {bits} bits; int4 holds {INT4_BITS}"
    if (far := largest_of(map(int4_zero, weights))) > BF16_INTEGERS:
        return f"a weight zero point {far:g} codes from the middle; the kernel's bfloat16 holds {BF16_INTEGERS}"
    return ""


def check_int8(device: torch.device) -> None:
    """Compute sums that float32 cannot represent: torchao uses it, silently, if the integer kernel fails.

    Raises:
        ValueError: another sum than that of the integers.
    """
    rows = torch.full((INT8_ROWS, 2048), 127, dtype=torch.int8, device=device)
    rows[:, 0] = 0  # an odd number of odd products: their sum is odd, and above 2^24
    found = safe_int_mm(rows, torch.full((2048, INT8_STEP), 127, dtype=torch.int8, device=device))
    if not bool((found == (expected := 2047 * 127 * 127)).all()):
        raise ValueError(f"torchao's int8 product on {device} gives {int(found[0, 0])} for {expected}")


@dataclass(frozen=True)
class ProductFormat:
    """A format of products.

    Args:
        product: makes the product of a layer, given the dimension of its channels, on a device.
        capability: CUDA compute capability of the oldest GPU with the kernel.
        no_convolution: reason why convolutions stay simulated.
        obstacle: reason why integer weights do not fit, or empty; None if inputs must be integers, too.
        note: how operands differ from those of the simulation.
        check: raises ValueError if the kernel is wrong on a device.
    """

    product: Callable[[DeployedProduct, int, torch.device], Product]
    capability: tuple[int, int]
    no_convolution: str = "torchao has no integer convolution"
    obstacle: Callable[[Sequence[SignedWeight]], str] | None = None
    note: Callable[[Sequence[SignedWeight]], str] = lambda _: ""
    check: Callable[[torch.device], None] = lambda _: None

    def why_not(self, deployed: DeployedLayer) -> str:
        """Reason why a layer stays simulated; empty if it is executed in this format."""
        layer = deployed.layer
        point = ((1, 1), (1, 1), (0, 0), 1)
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.padding, layer.groups) != point:
            return self.no_convolution
        weights = deployed.integer_weights
        return deployed.why if self.obstacle is None or not weights else self.obstacle(weights)

    def products(self, deployed: DeployedLayer, device: torch.device) -> list[Product]:
        """Products of a layer on a device; none if it stays simulated."""
        executed = () if self.why_not(deployed) else deployed.products
        return [self.product(product, deployed.axis, device) for product in executed]


FORMATS: Mapping[str, ProductFormat] = {
    "int8": ProductFormat(Int8Product, (7, 5), check=check_int8),
    "fp8": ProductFormat(fp8_product, (8, 9), "torchao's fp8 convolution has one scale in all", fp8_obstacle, fp8_note),
    "int4": ProductFormat(
        int4_product, (8, 0), obstacle=int4_obstacle, note=lambda _: "weights exact; inputs bf16, not on their grid"
    ),
}


def padded(x: Shaped[Tensor, "rows columns"], rows: int, columns: int) -> Shaped[Tensor, "more_rows more_columns"]:
    """Fill up with zeros below and to the right, to multiples of the two numbers."""
    return F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def as_matrix(x: Shaped[Tensor, "batch ..."], axis: int) -> Shaped[Tensor, "places channels"]:
    """Flatten all dimensions but the channels."""
    return x.movedim(axis, -1).flatten(0, -2)


def as_image(
    y: Float[Tensor, "places channels"], x: Shaped[Tensor, "batch ..."], axis: int
) -> Float[Tensor, "batch ..."]:
    """Undo `as_matrix` for the output of a layer with input `x`."""
    return y.reshape(*x.movedim(axis, -1).shape[:-1], -1).movedim(-1, axis).contiguous()


def largest_of(tensors: Iterable[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def centred(weight: SignedWeight) -> Float[Tensor, "out in"]:
    """Codes minus zero points."""
    return weight.signed.flatten(1).float() + weight.offset[:, None]


def int4_zero(weight: SignedWeight) -> Float[Tensor, "out"]:
    """8 - z, as the kernels add it."""
    return INT4_MIDDLE - weight.shift + weight.offset
