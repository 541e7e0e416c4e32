"""The quantized UNet: the float network with some layers replaced by their quantized twins."""

import copy
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tfmq_exp.core.finite import NotFiniteError, require_finite, within
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.denoisers.unet import attentions
from tfmq_exp.quant.layers import QUANT_LAYERS, QuantizedWeight, QuantLayer
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat.base import QATQuantizeFn
from tfmq_exp.quant.quantizers.affine import AffineQuantizer, WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.quant.quantizers.trainable import TrainableWeightQuantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.batched_generators import BatchedGenerators
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.attention import QuantAttnProcessor
from tfmq_exp.surgery.config import ActivationConfig, ResolvedConfig
from tfmq_exp.surgery.temporal_cache import CachedFeature, Unneeded


class QuantizedUNet(nn.Module):
    """Called like the UNet it holds. Owns the context; sets it from the timestep at every forward pass.

    Quantizers start in mode OFF. A layer's weight is either still float, with a quantizer, or already replaced by what its
    integers stand for; those are then in `integers`. Embedding projections that were replaced by stored features are in
    `cached`.
    """

    unet: Any  # one of diffusers' UNets

    def __init__(self, unet: nn.Module, plan: ResolvedConfig) -> None:
        super().__init__()
        self.unet, self.plan = unet, plan
        self.context = TimestepContext(plan.timesteps)
        self.integers: dict[str, tuple[QuantizedWeight, ...]] = {}
        self.cached: dict[str, QuantizedWeight] = {}
        self.bank: BatchedGenerators | None = None  # while the network is trained as a whole

    def forward(self, sample: Float[Tensor, "batch ..."], timestep: Shaped[Tensor, "..."], **conditions: Any) -> Any:
        """The UNet's own output. Raises ValueError at a timestep outside the finite set."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        with self.context.at(t), self.bank.at(t) if self.bank else nullcontext():
            return self.unet(sample, t, **conditions)

    # weights -----------------------------------------------------------------------------------------------------

    def layer(self, site: str) -> QuantLayer:
        """The quantized twin at a site."""
        layer = self.unet.get_submodule(site)
        if not isinstance(layer, QuantLayer):
            raise KeyError(f"the layer {site!r} is not quantized")
        return layer

    def weight_layers(self) -> tuple[str, ...]:
        """Sites whose weight is, or will be, integer."""
        return tuple(name for name, line in self.plan.sites.items() if line.weight)

    def weight_quantizers(self, sites: Collection[str] | None = None) -> list[WeightQuantizer]:
        """Quantizers of the weights that are not frozen yet."""
        wanted = self.weight_layers() if sites is None else [s for s in sites if s in self.plan.sites]
        return [quantizer for site in wanted for quantizer, _ in self.layer(site).weight_parts()]

    def calibrate_weights(self, sites: Collection[str] | None = None) -> None:
        """Set the scale and zero point of weight quantizers, of all by default, from their weights."""
        for site in self.weight_layers() if sites is None else sites:
            for quantizer, weight in self.layer(site).weight_parts():
                with within(f"the weight of {site}"):
                    quantizer.observe(weight)

    def learn_rounding(self, site: str) -> list[AdaRound]:
        """Start AdaRound on a weight, on each of its parts; nothing for a weight that stays float."""
        if site not in self.plan.sites:
            return []
        return [quantizer.learn_rounding(weight) for quantizer, weight in self.layer(site).weight_parts()]

    def freeze(self, site: str, integers: tuple[QuantizedWeight, ...] | None = None) -> None:
        """Turn one weight into integers: those given, or the quantizer's own under its present rounding."""
        layer = self.layer(site)
        self.integers[site] = integers or layer.quantized_weight()
        layer.freeze_weight(self.integers[site])

    # activations -------------------------------------------------------------------------------------------------

    def activation_quantizers(self) -> dict[str, AffineQuantizer]:
        """Every activation quantizer by its name in the network."""
        return {name: module for name, module in self.unet.named_modules() if isinstance(module, AffineQuantizer)}

    def activation_quantizers_in(self, block: str, sites: Collection[str]) -> dict[str, AffineQuantizer]:
        """Those of some layers, and those of the operands of attentions inside a block."""
        attentions = [name for name in self.plan.operands if name == block or name.startswith(f"{block}.")]
        owners = tuple([f"{site}." for site in sites] + [f"{name}.processor." for name in attentions])
        return {name: q for name, q in self.activation_quantizers().items() if name.startswith(owners)}

    def set_activations(self, mode: Mode) -> None:
        """Set the mode of every activation quantizer.

        Raises:
            RuntimeError: asked to quantize while some source has seen no data at some step.
        """
        if mode is Mode.QUANTIZE:
            self.require_calibrated()
        for quantizer in self.activation_quantizers().values():
            quantizer.mode = mode

    @contextmanager
    def naming_activations(self) -> Generator[None]:
        """Meanwhile, where an activation is not finite, say which one and at which timesteps."""
        last: tuple[str, Tensor, Tensor] | None = None

        def noting(name: str) -> Callable[[nn.Module, Any], None]:
            def note(_: nn.Module, args: Any) -> None:
                nonlocal last
                last = name, args[0], self.context.t

            return note

        handles = [
            quantizer.register_forward_pre_hook(noting(name))
            for name, quantizer in self.activation_quantizers().items()
        ]
        try:
            yield
        except NotFiniteError as error:
            if last is None:
                raise
            name, x, t = last
            wrong = t[~x.isfinite().flatten(1).all(dim=1)] if len(x) == len(t) else t[:0]
            when = f" at timesteps {', '.join(map(str, sorted(set(wrong.tolist()))[:5]))}" if len(wrong) else ""
            raise NotFiniteError(f"{name}{when}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()

    def require_calibrated(self) -> None:
        """Raise RuntimeError, naming it, if some activation source has seen no data at some step."""
        for name, quantizer in self.activation_quantizers().items():
            if missing := quantizer.source.uncalibrated():
                raise RuntimeError(
                    f"{name} has seen no calibration data ({len(missing)} of its ranges, "
                    f"{self.context.num_steps} sampling steps)"
                )

    def activation_state(self) -> dict[str, Tensor]:
        """Everything that activation quantizers have learned, by name."""
        quantizers = self.activation_quantizers().items()
        return {f"{name}.{key}": value for name, q in quantizers for key, value in q.state_dict().items()}

    def load_activations(self, state: Mapping[str, Tensor]) -> None:
        """Put back the state of some activation quantizers; KeyError for a name that is not here."""
        own = self.activation_state()
        for name, value in state.items():
            own[name].copy_(value)

    def activation_bits(self) -> tuple[int, ...]:
        """The bit-widths that a step can choose from, ascending; none where there is no choice."""
        return tuple(sorted({bits for switch in self.switches() for bits in switch.bits}))

    def switches(self) -> list[StepSwitch]:
        """Activations with more than one bit-width."""
        return [module for module in self.unet.modules() if isinstance(module, StepSwitch)]

    def use_bits(self, bits: Sequence[int]) -> None:
        """Set the bit-width of every step where there is a choice."""
        for switch in self.switches():
            switch.use(bits)

    def tabulate_scales(self) -> None:
        """Replace every source by what is left of it after learning: generated intervals become tables."""
        for name, quantizer in self.activation_quantizers().items():
            quantizer.merge()
            for part, value in quantizer.state_dict().items():
                require_finite(value, f"{part} of {name} after learning")
        self.plan = self.plan.merged()

    # temporal features -------------------------------------------------------------------------------------------

    def cache_feature(self, site: str, integers: QuantizedWeight) -> None:
        """Replace an embedding projection by its stored features."""
        self.cached[site] = integers
        self._replace(site, CachedFeature(integers, self.context))

    def drop(self, site: str) -> None:
        """Take out a layer whose output nobody reads any more."""
        self._replace(site, Unneeded())

    def _replace(self, site: str, module: nn.Module) -> None:
        self.unet.set_submodule(site, module.to(next(self.unet.parameters()).device))
        self.integers.pop(site, None)
        self.plan = replace(self.plan, sites={k: v for k, v in self.plan.sites.items() if k != site})


def build_quantized_unet(unet: nn.Module, plan: ResolvedConfig, estimator: Observer) -> QuantizedUNet:
    """A quantized copy of `unet` with exactly the quantizers of the table. The float network is left as it is."""
    model = QuantizedUNet(copy.deepcopy(unet).requires_grad_(False).eval(), plan)

    def quantizer(line: ActivationConfig) -> nn.Module:
        choices = [line.scale.quantizer(spec, model.context) for spec in line.specs]
        return choices[0] if len(choices) == 1 else StepSwitch(choices, model.context)

    for site, line in plan.sites.items():
        layer = model.unet.get_submodule(site)
        if type(layer) not in QUANT_LAYERS:
            raise TypeError(f"{site} is a {type(layer).__name__}, which has no quantized twin")
        twin = QUANT_LAYERS[type(layer)].from_float(layer)
        sizes = (line.split, twin.weight.shape[1] - line.split) if line.split else ()
        if line.weight:
            pieces = twin.weight.split(sizes, dim=1) if sizes else (twin.weight,)
            parts = [weight_quantizer(piece, line.weight, estimator, plan.trained) for piece in pieces]
            twin.weight_quantizer = SplitQuantizer(parts, sizes) if sizes else parts[0]
        if line.input:
            inputs = line.input
            twin.input_quantizer = (
                SplitQuantizer([quantizer(inputs) for _ in sizes], sizes) if sizes else quantizer(inputs)  # type: ignore[type-var]
            )
        if line.output:
            twin.output_quantizer = quantizer(line.output)
        model.unet.set_submodule(site, twin)
    for names in plan.tied:
        tie([model.layer(name).input_quantizer for name in names])
    modules = attentions(model.unet)
    for name, parts in plan.operands.items():
        processor: Any = QuantAttnProcessor({part: quantizer(line) for part, line in parts.items()})
        modules[name].set_processor(processor)
    device = next(unet.parameters()).device
    return model.to(device).eval()


def weight_quantizer(
    weight: Float[Tensor, "out *rest"], spec: QuantSpec, estimator: Observer, form: QATQuantizeFn | None
) -> WeightQuantizer:
    """One that rounds a given weight, or one under which the weight is trained by a form."""
    if form is None:
        return WeightQuantizer(weight, spec, estimator)
    return TrainableWeightQuantizer(weight, spec, estimator, form)


def tie(quantizers: Sequence[Any]) -> None:
    """Give all of them the parameters of the first: what one of them learns, all do."""
    for name, _ in list(quantizers[0].named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shared = quantizers[0].get_parameter(name)
        for other in quantizers[1:]:
            setattr(other.get_submodule(owner), leaf, shared)


def coverage(plan: ResolvedConfig, structure: UNetStructure) -> Mapping[str, Any]:
    """How much of the network the table makes integer: shares of weights and MACs, and the layers that stay float."""
    weights = sum(site.weights for site in structure.sites.values())
    macs = sum(site.macs for site in structure.sites.values())
    lines = [(structure.sites[name], line) for name, line in plan.sites.items()]
    both = [site for site, line in lines if line.weight and line.input]
    outputs = [site for site, line in lines if line.output]
    return {
        "layers": len(structure.sites),
        "weight_share": sum(site.weights for site, line in lines if line.weight) / weights,
        "mac_share_weights": sum(site.macs for site, line in lines if line.weight) / macs,
        "mac_share_weights_and_inputs": sum(site.macs for site in both) / macs,
        "mac_share_outputs": sum(site.macs for site in outputs) / macs,
        "float_weights": [name for name in structure.sites if name not in plan.sites or not plan.sites[name].weight],
        "float_inputs": [name for name in structure.sites if name not in plan.sites or not plan.sites[name].input],
        "attention_operands": sorted({part for parts in plan.operands.values() for part in parts}),
    }
