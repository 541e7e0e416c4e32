"""The quantized network: the float network with some layers replaced by quantized ones, as a table says."""

import copy
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tfmq_exp.core.finite import NotFiniteError, require_finite, within
from tfmq_exp.denoisers.denoiser import first_argument, flattened
from tfmq_exp.quant.layers import QUANT_LAYERS, QuantizedWeight, QuantLayer
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat_quantizers import TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, SplitQuantizer, StepSwitch, WeightQuantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.tdq import BatchedGenerators
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.stored_features import StoredFeature, Unneeded
from tfmq_exp.quant.timestep_context import Outside, Timestep, TimestepContext
from tfmq_exp.surgery.attention import quantize_operands
from tfmq_exp.surgery.resolve import ResolvedConfig


class QuantizedNetwork(nn.Module):
    """Called like the network that it holds, with the timestep by name. Sets its timestep context at every forward pass.

    Quantizers start in mode OFF. A layer's weight is either still float, with a quantizer, or frozen: replaced by the real values
    of its integers. Embedding projections may be replaced by stored features.
    """

    network: Any  # one of diffusers' denoisers

    def __init__(self, network: nn.Module, plan: ResolvedConfig) -> None:
        super().__init__()
        self.context = TimestepContext(plan.timesteps)
        self.network, self.plan, self.first_argument = network, plan, first_argument(network)
        self.replaced_weights = 0  # of layers that stored features replace, which are not in the artefact
        self.generators: BatchedGenerators | None = None  # while the network is trained as a whole

    def forward(
        self,
        sample: Float[Tensor, "batch ..."] | None = None,
        timestep: Shaped[Tensor, "..."] | float | None = None,
        *,
        outside: Outside | None = None,
        **arguments: Any,
    ) -> Any:
        """The network's own output.

        Args:
            sample: noisy input; it may have the name that the network gives it.
            timestep: one for all rows, or one for each.
            outside: what a timestep outside the finite set does; None for the plan's choice. `error` waits for the GPU to look.
            arguments: further ones of the network.

        Raises:
            ValueError: a timestep outside the finite set where that is an error, or a condition without stored features.
        """
        x: Tensor = arguments.pop(self.first_argument) if sample is None else sample
        t = torch.as_tensor(timestep, device=x.device).expand(len(x))
        scales = self.generators.scales(t) if self.generators else None
        given = flattened(arguments) if self.context.conditions else None
        with self.context.at(t, outside or self.plan.outside_timesteps, scales, conditions=given):
            return self.network(x, timestep=t, **arguments)

    def for_timesteps(self, timesteps: Sequence[Timestep]) -> Callable[..., Any]:
        """The network as a sampler calls it, whose timesteps are checked here once (ValueError) and no more at each call."""
        if self.plan.outside_timesteps != "error":
            return self
        self.context.require(timesteps)
        return partial(self, outside="unchecked")

    def layer(self, name: str) -> QuantLayer:
        """A quantized layer by name."""
        layer = self.network.get_submodule(name)
        if not isinstance(layer, QuantLayer):
            raise KeyError(f"the layer {name!r} is not quantized")
        return layer

    def weight_layers(self) -> tuple[str, ...]:
        """Layers whose weight is, or will be, integer."""
        return tuple(name for name, line in self.plan.layers.items() if line.weight)

    @property
    def integers(self) -> dict[str, tuple[QuantizedWeight, ...]]:
        """Weights that are integers, by layer, in as many parts as they have quantizers."""
        layers = [(name, layer) for name, layer in self.network.named_modules() if isinstance(layer, QuantLayer)]
        return {name: layer.quantized_weight() for name, layer in layers if layer.integers}

    def weight_quantizers(self, layers: Collection[str] | None = None) -> list[WeightQuantizer]:
        """Quantizers of the weights that are not frozen yet."""
        names = self.weight_layers() if layers is None else [name for name in layers if name in self.plan.layers]
        return [quantizer for name in names for quantizer, _ in self.layer(name).weight_parts()]

    def calibrate_weights(self, layers: Collection[str] | None = None) -> None:
        """Set the scale and zero point of weight quantizers, of all by default, from their weights."""
        for name in self.weight_layers() if layers is None else layers:
            for quantizer, weight in self.layer(name).weight_parts():
                with within(f"the weight of {name}"):
                    quantizer.observe(weight)

    def learn_rounding(self, layer: str) -> list[AdaRound]:
        """Start AdaRound on a weight, on each of its parts; empty for a weight that stays float."""
        if layer not in self.plan.layers:
            return []
        return [quantizer.learn_rounding(weight) for quantizer, weight in self.layer(layer).weight_parts()]

    def freeze(self, name: str, integers: tuple[QuantizedWeight, ...] | None = None) -> None:
        """Round a layer's weight to integers (default: with the quantizer's current rounding) and fix it."""
        self.layer(name).freeze_weight(integers or self.layer(name).quantized_weight())

    def activation_quantizers(self) -> dict[str, AffineQuantizer]:
        """Every activation quantizer by its name in the network."""
        return {name: module for name, module in self.network.named_modules() if isinstance(module, AffineQuantizer)}

    def activation_quantizers_in(self, block: str, layers: Collection[str]) -> dict[str, AffineQuantizer]:
        """Activation quantizers of some layers, and of the attention operands inside a block."""
        inside = [name for name in self.plan.operands if name == block or name.startswith(f"{block}.")]
        owners = (*(f"{layer}." for layer in layers), *(f"{name}.processor." for name in inside))
        return {name: q for name, q in self.activation_quantizers().items() if name.startswith(owners)}

    def set_activations(self, mode: Mode) -> None:
        """Set the mode of every activation quantizer; RuntimeError to quantize while some scale has had no data at some step."""
        if mode is Mode.QUANTIZE:
            self.require_calibrated()
        for quantizer in self.activation_quantizers().values():
            quantizer.mode = mode

    def require_calibrated(self) -> None:
        """Raise RuntimeError, with its name, if the scale of an activation has had no data at some step."""
        for name, quantizer in self.activation_quantizers().items():
            if missing := quantizer.scale_provider.uncalibrated():
                of = f"{len(missing)} of its ranges, {self.context.num_steps} sampling steps"
                raise RuntimeError(f"{name} has seen no calibration data ({of})")

    @contextmanager
    def naming_activations(self) -> Generator[None]:
        """Add the activation's name and timesteps to the error for one that is not finite, inside this block."""
        last: tuple[str, Tensor, Tensor] | None = None

        def note(name: str, _: nn.Module, args: Any) -> None:
            nonlocal last
            last = name, args[0], self.context.t

        quantizers = self.activation_quantizers().items()
        handles = [quantizer.register_forward_pre_hook(partial(note, name)) for name, quantizer in quantizers]
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

    def activation_state(self) -> dict[str, Tensor]:
        """State of all activation quantizers, by name."""
        quantizers = self.activation_quantizers().items()
        return {f"{name}.{key}": value for name, q in quantizers for key, value in q.state_dict().items()}

    def load_activations(self, state: Mapping[str, Tensor]) -> None:
        """Put back the state of some activation quantizers; KeyError for a name that is not here."""
        own = self.activation_state()
        for name, value in state.items():
            own[name].copy_(value)

    def switches(self) -> list[StepSwitch]:
        """Activations with more than one bit-width."""
        return [module for module in self.network.modules() if isinstance(module, StepSwitch)]

    def activation_bits(self) -> tuple[int, ...]:
        """The bit-widths that a step can choose from, ascending; empty where there is no choice."""
        return tuple(sorted({bits for switch in self.switches() for bits in switch.bits}))

    def use_bits(self, bits: Sequence[int]) -> None:
        """Set the bit-width of every step where there is a choice."""
        for switch in self.switches():
            switch.use(bits)

    def tabulate_scales(self) -> None:
        """Prepare activation quantizers for sampling: generated scales become tables."""
        for name, quantizer in self.activation_quantizers().items():
            quantizer.tabulate()
            for part, value in quantizer.state_dict().items():
                require_finite(value, f"{part} of {name} after learning")
        self.plan = self.plan.tabulated()

    @property
    def stored_features(self) -> dict[str, StoredFeature]:
        """Modules with stored features, by the names of the layers that they replace."""
        return {name: module for name, module in self.network.named_modules() if isinstance(module, StoredFeature)}

    def replace_layer(self, layer: str, feature: StoredFeature | None) -> None:
        """Put stored features in the place of a layer; None where nothing reads its output any more."""
        before = self.network.get_submodule(layer)
        self.replaced_weights += sum(x.numel() for x in before.parameters(recurse=False))
        self.network.set_submodule(layer, (feature or Unneeded(before)).to(next(self.network.parameters()).device))
        self.plan = replace(self.plan, layers={k: v for k, v in self.plan.layers.items() if k != layer})


def build_quantized_network(network: nn.Module, plan: ResolvedConfig, observer: Observer) -> QuantizedNetwork:
    """A quantized copy of `unet` with exactly the quantizers of the table, which observe ranges of weights with `observer`."""

    def weight_quantizer(part: Tensor, spec: QuantSpec) -> WeightQuantizer:
        if plan.trained:
            return TrainableWeightQuantizer(part, spec, observer, plan.trained)
        return WeightQuantizer(part, spec, observer)

    model = QuantizedNetwork(copy.deepcopy(network).requires_grad_(False).eval(), plan)
    for name, line in plan.layers.items():
        layer = model.network.get_submodule(name)
        if type(layer) not in QUANT_LAYERS:
            raise TypeError(f"{name} is a {type(layer).__name__}, which has no quantized class")
        own = QUANT_LAYERS[type(layer)].from_float(layer)
        sizes = (line.split, own.weight.shape[1] - line.split) if line.split else ()  # trunk and skip
        if spec := line.weight:
            pieces = own.weight.split(sizes, dim=1) if sizes else (own.weight,)
            parts = [weight_quantizer(piece, spec) for piece in pieces]
            own.weight_quantizer = SplitQuantizer(parts, sizes) if sizes else parts[0]
        if line.input:
            inputs: list[Any] = [line.input.quantizer(model.context) for _ in sizes or (1,)]
            own.input_quantizer = SplitQuantizer(inputs, sizes) if sizes else inputs[0]
        if line.output:
            own.output_quantizer = line.output.quantizer(model.context)
        model.network.set_submodule(name, own)
    for names in plan.tied:
        tie([model.layer(name).input_quantizer for name in names])
    operands = plan.operands.items()
    quantize_operands(
        model.network, {n: {p: line.quantizer(model.context) for p, line in parts.items()} for n, parts in operands}
    )
    return model.eval() if (like := next(network.parameters())).is_meta else model.to(like.device).eval()


def tie(quantizers: Sequence[Any]) -> None:
    """Give all of them the parameters of the first: what one of them learns, all do."""
    for name, _ in list(quantizers[0].named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shared = quantizers[0].get_parameter(name)
        for other in quantizers[1:]:
            setattr(other.get_submodule(owner), leaf, shared)
