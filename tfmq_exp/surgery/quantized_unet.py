"""The quantized UNet: the float network with some layers replaced by quantized ones."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tfmq_exp.core.finite import NotFiniteError, require_finite, within
from tfmq_exp.quant.layers import QuantizedWeight, QuantLayer
from tfmq_exp.quant.quantizers.affine import AffineQuantizer, WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.batched_generators import BatchedGenerators
from tfmq_exp.quant.timestep_context import Outside, TimestepContext
from tfmq_exp.surgery.resolve import ResolvedConfig
from tfmq_exp.surgery.temporal_cache import CachedFeature, Unneeded


class QuantizedUNet(nn.Module):
    """Called like the UNet that it holds. Sets its timestep context at every forward pass.

    Quantizers start in mode OFF. A layer's weight is either still float, with a quantizer, or frozen: replaced by the real values
    of its integers. Embedding projections that were replaced by stored features are in `cached`.
    """

    unet: Any  # one of diffusers' UNets

    def __init__(self, unet: nn.Module, plan: ResolvedConfig) -> None:
        super().__init__()
        self.context = TimestepContext(plan.timesteps)
        self.unet, self.plan = unet, plan
        self.cached: dict[str, QuantizedWeight] = {}
        self.generators: BatchedGenerators | None = None  # while the network is trained as a whole

    def forward(
        self,
        sample: Float[Tensor, "batch ..."],
        timestep: Shaped[Tensor, "..."],
        *,
        outside: Outside | None = None,
        **conditions: Any,
    ) -> Any:
        """The UNet's own output.

        Args:
            sample: noisy input.
            timestep: one for all rows, or one for each.
            outside: what a timestep outside the finite set does; None for the plan's choice. `error` waits for the GPU to look.
            conditions: further arguments of the UNet.

        Raises:
            ValueError: a timestep outside the finite set where that is an error.
        """
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        scales = self.generators.scales(t) if self.generators else None
        with self.context.at(t, outside or self.plan.outside_timesteps, scales):
            return self.unet(sample, t, **conditions)

    def for_timesteps(self, timesteps: Sequence[int]) -> Callable[..., Any]:
        """The network as a sampler calls it, whose timesteps are checked here once and no more at each call.

        Raises:
            ValueError: a timestep outside the finite set where that is an error.
        """
        if self.plan.outside_timesteps != "error":
            return self
        self.context.require(timesteps)
        return partial(self, outside="unchecked")

    def layer(self, site: str) -> QuantLayer:
        """A quantized layer by name."""
        layer = self.unet.get_submodule(site)
        if not isinstance(layer, QuantLayer):
            raise KeyError(f"the layer {site!r} is not quantized")
        return layer

    def weight_layers(self) -> tuple[str, ...]:
        """Layers whose weight is, or will be, integer."""
        return tuple(name for name, line in self.plan.sites.items() if line.weight)

    @property
    def integers(self) -> dict[str, tuple[QuantizedWeight, ...]]:
        """Weights that are integers, by layer, in as many parts as they have quantizers."""
        layers = {name: module for name, module in self.unet.named_modules() if isinstance(module, QuantLayer)}
        return {name: layer.quantized_weight() for name, layer in layers.items() if layer.integers}

    def weight_quantizers(self, sites: Collection[str] | None = None) -> list[WeightQuantizer]:
        """Quantizers of the weights that are not frozen yet."""
        names = self.weight_layers() if sites is None else [s for s in sites if s in self.plan.sites]
        return [quantizer for name in names for quantizer, _ in self.layer(name).weight_parts()]

    def calibrate_weights(self, sites: Collection[str] | None = None) -> None:
        """Set the scale and zero point of weight quantizers, of all by default, from their weights."""
        for name in self.weight_layers() if sites is None else sites:
            for quantizer, weight in self.layer(name).weight_parts():
                with within(f"the weight of {name}"):
                    quantizer.observe(weight)

    def learn_rounding(self, site: str) -> list[AdaRound]:
        """Start AdaRound on a weight, on each of its parts; empty for a weight that stays float."""
        if site not in self.plan.sites:
            return []
        return [quantizer.learn_rounding(weight) for quantizer, weight in self.layer(site).weight_parts()]

    def freeze(self, site: str, integers: tuple[QuantizedWeight, ...] | None = None) -> None:
        """Round a layer's weight to integers (default: with the quantizer's current rounding) and fix it."""
        layer = self.layer(site)
        layer.freeze_weight(integers or layer.quantized_weight())

    def activation_quantizers(self) -> dict[str, AffineQuantizer]:
        """Every activation quantizer by its name in the network."""
        return {name: module for name, module in self.unet.named_modules() if isinstance(module, AffineQuantizer)}

    def activation_quantizers_in(self, block: str, sites: Collection[str]) -> dict[str, AffineQuantizer]:
        """Activation quantizers of some layers, and of the attention operands inside a block."""
        inside = [name for name in self.plan.operands if name == block or name.startswith(f"{block}.")]
        owners = (*(f"{site}." for site in sites), *(f"{name}.processor." for name in inside))
        return {name: q for name, q in self.activation_quantizers().items() if name.startswith(owners)}

    def set_activations(self, mode: Mode) -> None:
        """Set the mode of every activation quantizer.

        Raises:
            RuntimeError: to quantize while some scale has had no data at some step.
        """
        if mode is Mode.QUANTIZE:
            self.require_calibrated()
        for quantizer in self.activation_quantizers().values():
            quantizer.mode = mode

    def require_calibrated(self) -> None:
        """Raise RuntimeError, with its name, if the scale of an activation has had no data at some step."""
        for name, quantizer in self.activation_quantizers().items():
            if missing := quantizer.source.uncalibrated():
                raise RuntimeError(
                    f"{name} has seen no calibration data ({len(missing)} of its ranges, "
                    f"{self.context.num_steps} sampling steps)"
                )

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
        return [module for module in self.unet.modules() if isinstance(module, StepSwitch)]

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

    def cache_feature(self, site: str, integers: QuantizedWeight) -> None:
        """Replace an embedding projection by its stored features."""
        self.cached[site] = integers
        self._replace(site, CachedFeature(integers, self.context))

    def drop(self, site: str) -> None:
        """Take out a layer whose output is not read any more."""
        self._replace(site, Unneeded())

    def _replace(self, site: str, module: nn.Module) -> None:
        self.unet.set_submodule(site, module.to(next(self.unet.parameters()).device))
        self.plan = replace(self.plan, sites={k: v for k, v in self.plan.sites.items() if k != site})
