"""The quantized UNet: the float network with some layers replaced by their quantized twins."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.denoisers.unet import attentions
from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.layers import TWINS, QuantizedWeight, QuantLayer
from tfmq_exp.quant.quantizers.affine import AffineQuantizer, WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.ranges import RangeEstimator
from tfmq_exp.quant.sources.per_step import PerStep
from tfmq_exp.quant.sources.static import Static
from tfmq_exp.surgery.attention import QuantAttnProcessor
from tfmq_exp.surgery.plan import InputPlan, ResolvedPlan


class QuantizedUNet(nn.Module):
    """Called like the UNet it holds. Owns the clock; sets it from the timestep at every forward pass.

    Quantizers start in mode OFF. A layer's weight is either still float, with a quantizer, or already replaced by what its
    integers stand for; those are then in `integers`.
    """

    unet: Any  # one of diffusers' UNets

    def __init__(self, unet: nn.Module, plan: ResolvedPlan) -> None:
        super().__init__()
        self.unet, self.plan = unet, plan
        self.clock = StepClock(plan.timesteps)
        self.integers: dict[str, QuantizedWeight] = {}

    def forward(self, sample: Float[Tensor, "batch ..."], timestep: Shaped[Tensor, "..."], **conditions: Any) -> Any:
        """The UNet's own output. Raises ValueError at a timestep outside the finite set."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        with self.clock.at(t):
            return self.unet(sample, t, **conditions)

    def layer(self, site: str) -> QuantLayer:
        """The quantized twin at a site."""
        layer = self.unet.get_submodule(site)
        if not isinstance(layer, QuantLayer):
            raise KeyError(f"the layer {site!r} is not quantized")
        return layer

    def weight_sites(self) -> tuple[str, ...]:
        """Sites whose weight is, or will be, integer."""
        return tuple(name for name, line in self.plan.sites.items() if line.weight)

    def weight_quantizers(self, sites: Collection[str] | None = None) -> list[WeightQuantizer]:
        """Quantizers of the weights that are not frozen yet."""
        found = [self.layer(name).weight_quantizer for name in (self.weight_sites() if sites is None else sites)]
        return [quantizer for quantizer in found if isinstance(quantizer, WeightQuantizer)]

    def activation_quantizers(self) -> dict[str, AffineQuantizer]:
        """Every activation quantizer by its name in the network."""
        return {name: module for name, module in self.unet.named_modules() if isinstance(module, AffineQuantizer)}

    def place_weight_grids(self) -> None:
        """Set the scale and zero point of every weight quantizer from its weight."""
        for site in self.weight_sites():
            layer = self.layer(site)
            if isinstance(layer.weight_quantizer, WeightQuantizer):
                layer.weight_quantizer.observe(layer.weight)

    def freeze(self, site: str, integers: QuantizedWeight | None = None) -> None:
        """Turn one weight into integers: those given, or the quantizer's own under its present rounding."""
        layer = self.layer(site)
        self.integers[site] = integers or layer.quantized_weight()
        layer.freeze_weight(self.integers[site])

    def set_activations(self, mode: Mode) -> None:
        """Set the mode of every activation quantizer.

        Raises:
            RuntimeError: asked to quantize while some source has seen no data at some step.
        """
        if mode is Mode.QUANTIZE:
            self.require_calibrated()
        for quantizer in self.activation_quantizers().values():
            quantizer.mode = mode

    def require_calibrated(self) -> None:
        """Raise RuntimeError, naming it, if some activation source has seen no data at some step."""
        for name, quantizer in self.activation_quantizers().items():
            if missing := quantizer.source.uncalibrated():
                steps = self.clock.num_steps
                raise RuntimeError(f"{name} has seen no calibration data ({len(missing)} of {steps} steps)")


def build(unet: nn.Module, plan: ResolvedPlan, estimator: RangeEstimator) -> QuantizedUNet:
    """A quantized copy of `unet` with exactly the quantizers of the table. The float network is left as it is."""
    model = QuantizedUNet(copy.deepcopy(unet).requires_grad_(False).eval(), plan)

    def quantizer(line: InputPlan) -> AffineQuantizer:
        if line.per_step:
            return AffineQuantizer(PerStep(line.spec, model.clock, momentum=line.momentum))
        return AffineQuantizer(Static(line.spec, momentum=line.momentum))

    for site, line in plan.sites.items():
        layer = model.unet.get_submodule(site)
        if type(layer) not in TWINS:
            raise TypeError(f"{site} is a {type(layer).__name__}, which has no quantized twin")
        twin = TWINS[type(layer)].from_float(layer)
        if line.weight:
            twin.weight_quantizer = WeightQuantizer(twin.weight, line.weight, estimator)
        if line.input:
            twin.input_quantizer = quantizer(line.input)
        parent, _, name = site.rpartition(".")
        setattr(model.unet.get_submodule(parent), name, twin)
    modules = attentions(model.unet)
    for name, parts in plan.operands.items():
        processor: Any = QuantAttnProcessor({part: quantizer(line) for part, line in parts.items()})
        modules[name].set_processor(processor)
    device = next(unet.parameters()).device
    return model.to(device)


def coverage(plan: ResolvedPlan, anatomy: Anatomy) -> Mapping[str, Any]:
    """How much of the network the table makes integer: shares of weights and MACs, and the layers that stay float."""
    weights = sum(site.weights for site in anatomy.sites.values())
    macs = sum(site.macs for site in anatomy.sites.values())
    lines = [(anatomy.sites[name], line) for name, line in plan.sites.items()]
    both = [site for site, line in lines if line.weight and line.input]
    return {
        "layers": len(anatomy.sites),
        "weight_share": sum(site.weights for site, line in lines if line.weight) / weights,
        "mac_share_weights": sum(site.macs for site, line in lines if line.weight) / macs,
        "mac_share_weights_and_inputs": sum(site.macs for site in both) / macs,
        "float_weights": [name for name in anatomy.sites if name not in plan.sites or not plan.sites[name].weight],
        "float_inputs": [name for name in anatomy.sites if name not in plan.sites or not plan.sites[name].input],
        "attention_operands": sorted({part for parts in plan.operands.values() for part in parts}),
    }
