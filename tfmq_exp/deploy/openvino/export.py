"""Export of a quantized UNet as one OpenVINO model, and the kernels that the CPU plugin executes it with."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from torch import Tensor, nn

from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.deploy.activation_tables import activation_scale
from tfmq_exp.deploy.engine import write_manifest
from tfmq_exp.deploy.layers import DeployedLayer, ProductLayer, deployed_layers, layer_report
from tfmq_exp.deploy.openvino.attention import attention_noise, attention_rows, name_attentions
from tfmq_exp.deploy.openvino.graph import FloatProduct, IntegerProduct, RealQuantizer
from tfmq_exp.deploy.openvino.runtime import FORMAT, ExportedUNet, bf16_attention_pays, compile_settings
from tfmq_exp.deploy.openvino.trace import Tap, shared_copy, trace
from tfmq_exp.quant.quantizers import AffineQuantizer, StepSwitch
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
INTEGER = re.compile(r"_[iu]8$", re.IGNORECASE)  # jit_avx2_I8, brgconv_avx512_I8, jit_gemm_i8


@dataclass(frozen=True)
class ConvertedModel:
    """OpenVINO's model in memory, and the names of the nodes that must be executed in integers, by layer."""

    model: Any
    products: Mapping[str, Sequence[str]]


def export(
    model: QuantizedNetwork,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    split_int8_weights: bool,
    bf16_attention: bool | None = None,
    threads: int | None = None,
) -> ConvertedModel:
    """Export a finished model, and check that every layer that is representable in integers is executed in integers here.

    Args:
        model: weights frozen, scale sources merged, bits chosen; or the result of `serialization.load`.
        example: keyword arguments of a forward pass; all shapes but the batch are those of the exported model.
        folder: gets `model.xml`, `model.bin` and `deployed.json`.
        split_int8_weights: execute weights above 64 as a sum of two, which is exact also where pairs of products saturate.
        bf16_attention: of the check and the manifest, see `ExportedUNet`; the files are the same.
        threads: of the check; None leaves the number to OpenVINO.

    Raises:
        ValueError: a representable layer is not executed in integers, a layer is not called exactly once, or an input
            quantizer is not representable.
    """
    model.require_calibrated()
    converted = convert(model, example, pairs_saturate=split_int8_weights)
    ov.save_model(converted.model, folder / "model.xml", compress_to_fp16=False)
    manifest: dict[str, Any] = {"format": FORMAT, "timesteps": list(model.context.timesteps)}
    manifest |= {"split_int8_weights": split_int8_weights, "openvino": ov.__version__}
    manifest |= {"settings": compile_settings(threads, "f32"), "bytes": stored_bytes(converted.model)}
    manifest["layers"] = layer_report(model, deployed_layers(model))
    bf16, last = bf16_attention_pays() if bf16_attention is None else bf16_attention, model.context.num_steps - 1
    noise = attention_noise(converted.model, example, sorted({0, last // 2, last}), threads)
    manifest["attention"] = attention_rows(noise, bf16)
    write_manifest(folder, manifest)
    opened = ExportedUNet(folder, batch=len(example["sample"]), threads=threads, bf16_attention=bf16)
    kernels = executed_kernels(opened.compiled)
    check_integer(kernels, converted.products)
    counts = Counter(f"{kernel.operation} {kernel.kernel}" for kernel in kernels if kernel.product)
    write_manifest(folder, {**manifest, "kernels": counts})
    return converted


def convert(
    model: QuantizedNetwork, example: Mapping[str, Tensor], pairs_saturate: bool = False, taps: Sequence[str] = ()
) -> ConvertedModel:
    """Convert a model to OpenVINO's, with inputs `sample`, `step` and its conditions, for any batch.

    Args:
        model: finished, see `export`; it is not changed.
        example: keyword arguments of a forward pass; all shapes but the batch become those of the converted model.
        pairs_saturate: whether the processor adds pairs of products in sixteen bits; weights above 64 are then split in two.
        taps: names of layers whose inputs and outputs become further outputs.

    Raises:
        ValueError: an input quantizer is not representable, or a layer is not called exactly once.
    """
    model = shared_copy(model)
    context, products, tapped = model.context, dict[str, list[FloatProduct | IntegerProduct]](), dict[str, Tap]()
    layers = deployed_layers(model)
    for layer in layers:
        products[layer.name] = graph_products(layer, pairs_saturate)
        replaced: nn.Module = ProductLayer(layer, products[layer.name], context)
        if layer.name in taps:
            replaced = tapped[layer.name] = Tap(replaced)
        model.network.set_submodule(layer.name, replaced)
    switches = tuple(f"{name}." for name, module in model.network.named_modules() if isinstance(module, StepSwitch))
    for name, module in list(model.network.named_modules()):
        if isinstance(module, AffineQuantizer | StepSwitch) and not name.startswith(switches):
            model.network.set_submodule(name, RealQuantizer(activation_scale(module, context.num_steps)))
    result, nodes = trace(model.network, context, example, [tapped[name] for name in taps])
    cores = {name: [nodes[product.multiply] for product in made] for name, made in products.items()}
    if wrong := [name for name, calls in cores.items() if any(len(call) != 1 for call in calls)]:
        raise ValueError(f"{len(wrong)} layers are not called exactly once, first {wrong[0]!r}")
    names = {
        layer.name: [f"{layer.name}/product{i}" for i in range(len(layer.products))]
        for layer in layers
        if layer.integer
    }
    for layer, own in names.items():
        for name, (node,) in zip(own, cores[layer], strict=True):
            node.set_friendly_name(name)
    name_attentions(result, attentions(model.network))
    return ConvertedModel(result, names)


def graph_products(deployed: DeployedLayer, saturates: bool) -> list[FloatProduct | IntegerProduct]:
    """Products of a layer; ValueError for an input quantizer that is not representable."""
    quantized = not isinstance(deployed.layer.input_quantizer, nn.Identity)
    if quantized and any(product.input is None for product in deployed.products):
        raise ValueError(f"the layer {deployed.name!r} cannot be converted: {deployed.why}")
    weights = deployed.layer.weight.split([product.channels for product in deployed.products], dim=1)
    pairs = zip(deployed.products, weights, strict=True)
    if deployed.integer:
        return [IntegerProduct(deployed, product, real, saturates) for product, real in pairs]
    return [FloatProduct(deployed, product, real) for product, real in pairs]


def stored_bytes(model: Any) -> dict[str, int]:
    """Bytes of an OpenVINO model's constants by element type, largest first."""
    found = Counter[str]()
    for op in (op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"):
        kind = op.get_output_element_type(0)
        found[kind.get_type_name()] += -(-math.prod(op.get_output_shape(0)) * kind.bitwidth // 8)
    return dict(found.most_common())


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
    found, names = list[ExecutedKernel](), ("originalLayersNames", "layerType", "primitiveType")
    for op in compiled.get_runtime_model().get_ordered_ops():
        nodes, operation, kernel = (op.get_rt_info()[name].astype(str) for name in names)
        inputs = tuple(op.get_input_element_type(i).get_type_name() for i in range(op.get_input_size()))
        found.append(ExecutedKernel(tuple(nodes.split(",")), operation, kernel, inputs))
    return found


def check_integer(kernels: Sequence[ExecutedKernel], products: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError, with layer and kernel, unless products (names of their nodes, by layer) are executed in integers."""
    # a fused node may have the name of the operation that followed the product
    by_node = {node.split("/Dequantization")[0]: one for one in kernels if one.product for node in one.nodes}
    found = [(layer, by_node.get(name)) for layer, names in products.items() for name in names]
    wrong = [
        f"{layer} ({f'{one.kernel} of ' + ' and '.join(one.inputs[:2]) if one else 'not found'})"
        for layer, one in found
        if one is None or not one.integer
    ]
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
