"""Export of a quantized UNet as one OpenVINO model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import activation_scale
from tfmq_exp.deploy.engine import write_manifest
from tfmq_exp.deploy.layer_report import DeployedLayer, deployed_layers, layer_report
from tfmq_exp.deploy.openvino.executed_kernels import check_integer, executed_kernels
from tfmq_exp.deploy.openvino.fake_quantize import GraphQuantizer, Node, constant, step_columns
from tfmq_exp.deploy.openvino.graph import layer_columns, layer_graph
from tfmq_exp.deploy.openvino.runtime import FORMAT, ExportedUNet, compile_settings
from tfmq_exp.deploy.openvino.trace import GraphReplacement, trace
from tfmq_exp.quant.layers import CachedFeature
from tfmq_exp.quant.quantizers import AffineQuantizer, StepSwitch
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class ConvertedModel:
    """A model in memory.

    Args:
        model: OpenVINO's.
        products: names of the nodes that must be executed in integers, by layer.
        taps: input and output of every quantized layer.
    """

    model: Any
    products: Mapping[str, tuple[str, ...]]
    taps: Mapping[str, tuple[Node, Node]]


class BuiltLayer(NamedTuple):
    """Operations that were made for a layer: one that reads its input, the last one, and the products in integers."""

    name: str
    reader: tuple[Node, int]  # and the index of its input; a port would not keep its operation alive
    output: Node
    products: Sequence[Node]


def export(
    model: QuantizedUNet,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    split_int8_weights: bool,
    threads: int | None = None,
) -> ConvertedModel:
    """Export a finished model, and check that every layer that is representable in integers is executed in integers here.

    Args:
        model: weights frozen, scale sources merged, bits chosen; or the result of `serialization.load`.
        example: keyword arguments of a forward pass; all shapes but the batch are those of the exported model.
        folder: gets `model.xml`, `model.bin` and `deployed.json`.
        split_int8_weights: execute weights above 64 as a sum of two, which is exact also where pairs of products saturate.
        threads: of the check; None leaves the number to OpenVINO.

    Raises:
        ValueError: a representable layer is not executed in integers, a layer is not called exactly once, or an input
            quantizer is not representable.
    """
    model.require_calibrated()
    layers = deployed_layers(model)
    converted = convert(model, layers, example, pairs_saturate=split_int8_weights)
    ov.save_model(converted.model, folder / "model.xml", compress_to_fp16=False)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "timesteps": list(model.context.timesteps),
        "split_int8_weights": split_int8_weights,
        "openvino": ov.__version__,
        "settings": compile_settings(threads, "f32"),
        "bytes": stored_bytes(converted.model),
        "layers": layer_report(model, layers),
    }
    write_manifest(folder, manifest)
    kernels = executed_kernels(ExportedUNet(folder, batch=len(example["sample"]), threads=threads).compiled)
    check_integer(kernels, converted.products)
    counts = Counter(f"{kernel.operation} {kernel.kernel}" for kernel in kernels if kernel.product)
    write_manifest(folder, {**manifest, "kernels": counts})
    return converted


def convert(
    model: QuantizedUNet, layers: Sequence[DeployedLayer], example: Mapping[str, Tensor], pairs_saturate: bool = False
) -> ConvertedModel:
    """Convert a model to OpenVINO's, with inputs `sample`, `step` and its conditions, for any batch.

    Args:
        model: finished, see `export`.
        layers: quantized layers of the model.
        example: keyword arguments of a forward pass; all shapes but the batch become those of the converted model.
        pairs_saturate: whether the processor adds pairs of products in sixteen bits; weights above 64 are then split in two.

    Raises:
        ValueError: an input quantizer is not representable, or a layer is not called exactly once.
    """
    for layer in layers:
        quantized = not isinstance(layer.layer.input_quantizer, nn.Identity)
        if quantized and any(product.input is None for product in layer.products):
            raise ValueError(f"the layer {layer.name!r} cannot be converted: {layer.why}")
    built: list[BuiltLayer] = []
    replacements = [replace_layer(layer, built, pairs_saturate) for layer in layers]
    replacements += replace_quantizers(model, layers)
    replacements += [replace_feature(module) for module in model.unet.modules() if isinstance(module, CachedFeature)]
    with model.context.at(torch.tensor(model.context.timesteps[:1])):  # torch's tracer reads every property of a module
        result = trace(model.unet, model.context.timesteps, replacements, example)
    calls = Counter(layer.name for layer in built)
    if wrong := [layer.name for layer in layers if calls[layer.name] != 1]:
        raise ValueError(f"{len(wrong)} layers are not called exactly once, first {wrong[0]!r}")
    for layer in built:
        for i, product in enumerate(layer.products):
            product.set_friendly_name(f"{layer.name}/product{i}")
    products = {one.name: tuple(node.get_friendly_name() for node in one.products) for one in built if one.products}
    taps = {one.name: (one.reader[0].input_value(one.reader[1]), one.output.output(0)) for one in built}
    return ConvertedModel(result, products, taps)


def replace_layer(layer: DeployedLayer, built: list[BuiltLayer], pairs_saturate: bool) -> GraphReplacement:
    """A quantized layer; appended to `built` during conversion."""

    def build(x: Node, now: Mapping[str, Node]) -> Node:
        others = {port.get_node().get_name() for port in x.get_target_inputs()}
        y, products = layer_graph(layer, x, now, pairs_saturate=pairs_saturate)
        reader = next(port for port in x.get_target_inputs() if port.get_node().get_name() not in others)
        built.append(BuiltLayer(layer.name, (reader.get_node(), reader.get_index()), y, products))
        return y

    return GraphReplacement(layer.layer, build, layer_columns(layer), partial(zero_output, layer.layer))


def replace_quantizers(model: QuantizedUNet, layers: Sequence[DeployedLayer]) -> list[GraphReplacement]:
    """Quantizers outside quantized layers: of the operands of attention."""
    inside = {id(module) for layer in layers for module in layer.layer.modules()}
    inside |= {id(choice) for switch in model.switches() for choice in switch.choices}
    replacements: list[GraphReplacement] = []
    for module in model.unet.modules():
        if isinstance(module, AffineQuantizer | StepSwitch) and id(module) not in inside:
            scale = activation_scale(module, model.context.num_steps)
            build = partial(lambda scale, x, now: GraphQuantizer(scale, now).fake_quantize(x), scale)
            replacements.append(GraphReplacement(module, build, step_columns(scale)))
    return replacements


def replace_feature(module: CachedFeature) -> GraphReplacement:
    """A stored temporal feature, looked up by the index of the step; one row for the whole batch."""
    table, width = constant(module.table), module.table.shape[1]

    def build(_: Node, now: Mapping[str, Node]) -> Node:
        return ops.gather(table, ops.convert(now["step"], "i64"), ops.constant(0))

    return GraphReplacement(module, build, {"step": torch.arange(len(module.table))}, lambda _: torch.zeros(1, width))


def zero_output(layer: Any, x: Tensor) -> Tensor:
    """Zeros in the shape of a layer's output; its parameters must not be used while tracing."""
    if not isinstance(layer, nn.Conv2d):
        return F.linear(x, torch.zeros(layer.out_features, layer.in_features))
    kernel = torch.zeros(layer.out_channels, layer.in_channels, *layer.kernel_size)
    return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)


def stored_bytes(model: Any) -> dict[str, int]:
    """Bytes of an OpenVINO model's constants by element type, largest first."""
    found = Counter[str]()
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_output_element_type(0)
            bits = int(np.prod(op.get_output_shape(0), dtype=np.int64)) * kind.bitwidth
            found[kind.get_type_name()] += -(-bits // 8)
    return dict(found.most_common())
