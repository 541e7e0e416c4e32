"""A quantized network from a float one and a table."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from tfmq_exp.denoisers.unet import attentions
from tfmq_exp.quant.layers import QUANT_LAYERS, QuantLayer
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat_quantizers import TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import SplitQuantizer, WeightQuantizer
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.attention import QuantAttnProcessor
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.resolve import LayerConfig, ResolvedConfig


def build_quantized_unet(unet: nn.Module, plan: ResolvedConfig, observer: Observer) -> QuantizedUNet:
    """A quantized copy of `unet` with exactly the quantizers of the table. The float network is left as it is.

    Args:
        unet: the float network.
        plan: the table.
        observer: of the ranges of weights.
    """
    model = QuantizedUNet(copy.deepcopy(unet).requires_grad_(False).eval(), plan)
    for name, line in plan.layers.items():
        layer = model.unet.get_submodule(name)
        if type(layer) not in QUANT_LAYERS:
            raise TypeError(f"{name} is a {type(layer).__name__}, which has no quantized class")
        own = QUANT_LAYERS[type(layer)].from_float(layer)
        add_quantizers(own, line, plan, observer, model.context)
        model.unet.set_submodule(name, own)
    for names in plan.tied:
        tie([model.layer(name).input_quantizer for name in names])
    modules = attentions(model.unet)
    for name, parts in plan.operands.items():
        processor: Any = QuantAttnProcessor({part: line.quantizer(model.context) for part, line in parts.items()})
        modules[name].set_processor(processor)
    return model.to(next(unet.parameters()).device).eval()


def add_quantizers(
    layer: QuantLayer, line: LayerConfig, plan: ResolvedConfig, observer: Observer, context: TimestepContext
) -> None:
    """Give a layer the quantizers of its line of the table.

    Args:
        layer: gets them; its weight is that of the float network.
        line: specs of weight, input and output; the first `split` input channels have quantizers of their own.
        plan: the table, which says whether weights are trained.
        observer: of the ranges of weights.
        context: timesteps of the rows at hand, which scales depend on.
    """
    sizes = (line.split, layer.weight.shape[1] - line.split) if line.split else ()
    if spec := line.weight:
        parts = [
            TrainableWeightQuantizer(piece, spec, observer, plan.trained)
            if plan.trained
            else WeightQuantizer(piece, spec, observer)
            for piece in (layer.weight.split(sizes, dim=1) if sizes else (layer.weight,))
        ]
        layer.weight_quantizer = SplitQuantizer(parts, sizes) if sizes else parts[0]
    if line.input:
        inputs: list[Any] = [line.input.quantizer(context) for _ in sizes or (1,)]
        layer.input_quantizer = SplitQuantizer(inputs, sizes) if sizes else inputs[0]
    if line.output:
        layer.output_quantizer = line.output.quantizer(context)


def tie(quantizers: Sequence[Any]) -> None:
    """Give all of them the parameters of the first: what one of them learns, all do."""
    for name, _ in list(quantizers[0].named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shared = quantizers[0].get_parameter(name)
        for other in quantizers[1:]:
            setattr(other.get_submodule(owner), leaf, shared)
