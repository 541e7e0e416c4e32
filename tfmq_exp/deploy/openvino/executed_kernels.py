"""Kernels that OpenVINO's CPU plugin executes, read from the compiled model; the exported graph does not determine them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from tfmq_exp.deploy.openvino.runtime import compile_settings

PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
INTEGER = re.compile(r"_[iu]8$", re.IGNORECASE)  # jit_avx2_I8, brgconv_avx512_I8, jit_gemm_i8


@dataclass(frozen=True)
class ExecutedKernel:
    """Node of the execution graph: the model's nodes that are fused in it, its operation, kernel, and types of inputs."""

    nodes: tuple[str, ...]
    operation: str
    kernel: str
    inputs: tuple[str, ...]

    @property
    def product(self) -> bool:
        return self.operation in PRODUCTS

    @property
    def integer(self) -> bool:
        """Whether it is a product of bytes by a kernel for bytes."""
        return self.product and bool(INTEGER.search(self.kernel)) and {"u8", "i8"}.issuperset(self.inputs[:2])


def executed_kernels(compiled: Any) -> list[ExecutedKernel]:
    """Read the execution graph of a compiled model."""
    found: list[ExecutedKernel] = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        nodes, operation, kernel = (
            info[name].astype(str) for name in ("originalLayersNames", "layerType", "primitiveType")
        )
        inputs = tuple(op.get_input_element_type(i).get_type_name() for i in range(op.get_input_size()))
        found.append(ExecutedKernel(tuple(nodes.split(",")), operation, kernel, inputs))
    return found


def check_integer(kernels: Sequence[ExecutedKernel], products: Mapping[str, Sequence[str]]) -> None:
    """Check that products are executed in integers.

    Args:
        kernels: of the compiled model.
        products: names of the nodes, by layer.

    Raises:
        ValueError: a product that is not; names its layer and kernel.
    """
    # a fused node may have the name of the operation that followed the product
    by_node = {node.split("/Dequantization")[0]: one for one in kernels if one.product for node in one.nodes}
    wrong: list[str] = []
    for layer, names in products.items():
        for one in map(by_node.get, names):
            if one is None:
                wrong.append(f"{layer} (not found)")
            elif not one.integer:
                wrong.append(f"{layer} ({one.kernel} of {' and '.join(one.inputs[:2])})")
    if wrong:
        raise ValueError(f"{len(wrong)} products are not executed in integers: {', '.join(wrong[:8])}")


def pairs_saturate() -> bool:
    """Whether OpenVINO adds pairs of byte products in sixteen bits here, found by multiplying the largest bytes.

    Without VNNI instructions such sums stop at 2^15 - 1.
    """
    channels = 64
    x = ops.parameter([1, channels, 8, 8], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (0, 255)]
    weight = ops.convert(ops.constant(np.full((channels, channels, 1, 1), 127, np.int8)), "f32")
    scaled = ops.multiply(weight, ops.constant(np.ones((channels, 1, 1, 1), np.float32)))
    y = ops.convolution(ops.fake_quantize(x, *ends, *ends, 256), scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    model: Any = ov.Model([y], [x])  # pyright: ignore[reportGeneralTypeIssues]
    compiled = ov.Core().compile_model(model, "CPU", compile_settings(1, "f32"))
    found = compiled([np.full((1, channels, 8, 8), 255, np.float32)])[0]
    return bool(np.abs(found - 255 * 127 * channels).max() > 1)
