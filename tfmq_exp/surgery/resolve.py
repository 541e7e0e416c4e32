"""The quantization table of one network: a configuration resolved layer by layer, and its plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any

from tfmq_exp.core.validate import COUNT, Checked, optional
from tfmq_exp.denoisers.structure import LayerInfo, NetworkStructure, Role
from tfmq_exp.quant.qat_functions import Duq, Lsq, QATQuantizeFn, Qil
from tfmq_exp.quant.qat_quantizers import Offset, TrainableQuantizer
from tfmq_exp.quant.quantizers import AffineQuantizer, StepSwitch
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import OutsideTimesteps, Timestep, TimestepContext
from tfmq_exp.surgery.config import STORED_SCALES, Bits, QuantizationConfig, ScalePlan, widths

OPERANDS = ("query", "key", "value")  # and "probabilities"


@dataclass(frozen=True)
class ActivationConfig:
    """One quantized activation: its spec, or several to choose from step by step, its scale, and its QAT function if any."""

    specs: tuple[QuantSpec, ...]
    scale: ScaleConfig
    fn: QATQuantizeFn | None = None
    offset: Offset = "zero"

    def __post_init__(self) -> None:
        if self.fn is None and self.offset != "zero":
            raise ValueError(f"only QAT quantizers have an offset, got {self.offset!r}")

    def tabulated(self) -> "ActivationConfig":
        """The configuration after calibration and learning."""
        return replace(self, scale=self.scale.tabulated(), fn=self.fn and self.fn.for_inference())

    def quantizer(self, context: TimestepContext) -> AffineQuantizer | StepSwitch:
        """A new quantizer, or a switch between quantizers of several widths."""
        sources = [self.scale.build(spec, context) for spec in self.specs]
        fn = self.fn
        choices = [TrainableQuantizer(s, fn, self.offset) if fn else AffineQuantizer(s) for s in sources]
        return choices[0] if len(choices) == 1 else StepSwitch(choices, context)


@dataclass(frozen=True)
class LayerConfig(Checked):
    """One line of the table. `split` input channels come from the trunk, the others from the skip."""

    weight: QuantSpec | None
    input: ActivationConfig | None
    output: ActivationConfig | None = None
    split: Annotated[int | None, optional(COUNT)] = None

    def tabulated(self) -> "LayerConfig":
        ends = {name: line and line.tabulated() for name, line in (("input", self.input), ("output", self.output))}
        return replace(self, **ends)


@dataclass(frozen=True)
class ResolvedConfig(Checked):
    """The whole table: every quantized layer by name, attention's operands by the attention's name, and the finite set.

    `outside_timesteps` is what a timestep outside that set does. `tied` input quantizers learn together; `trained` is the QAT
    function of weights. Neither matters once learning is over.
    """

    layers: Mapping[str, LayerConfig]
    operands: Mapping[str, Mapping[str, ActivationConfig]]
    timesteps: tuple[Timestep, ...]
    outside_timesteps: OutsideTimesteps
    tied: tuple[tuple[str, ...], ...] = ()
    trained: QATQuantizeFn | None = None

    def tabulated(self) -> "ResolvedConfig":
        """The table after calibration and learning."""
        layers = {name: line.tabulated() for name, line in self.layers.items()}
        operands = {name: {k: v.tabulated() for k, v in parts.items()} for name, parts in self.operands.items()}
        return ResolvedConfig(layers, operands, self.timesteps, self.outside_timesteps)


# of a tabulated table, as records are stored
STORED = (ResolvedConfig, LayerConfig, ActivationConfig, QuantSpec, *STORED_SCALES, Lsq, Duq, Qil)


def resolve(
    config: QuantizationConfig,
    structure: NetworkStructure,
    attentions: tuple[str, ...],
    scales: ScalePlan,
    timesteps: tuple[Timestep, ...],
) -> ResolvedConfig:
    """The table for one network.

    Args:
        config: bits by role and by name.
        structure: layers of the network.
        attentions: names of its attentions.
        scales: of activations.
        timesteps: the finite set, in the sampler's order.

    Raises:
        ValueError: a pattern that matches no layer, or a configuration that leaves everything float.
    """
    for pattern in config.sites:
        if not any(fnmatchcase(name, pattern) for name in structure.layers):
            near = get_close_matches(pattern, structure.layers, n=3, cutoff=0.3) or list(structure.layers)[:3]
            raise ValueError(
                f"the pattern {pattern!r} in surgery.sites matches no layer; layers are called {', '.join(near)}, ..."
            )

    def activation(
        name: str, bits: Bits | None, role: Role | None, scheme: Scheme = config.grids.activations
    ) -> ActivationConfig | None:
        scale, fn, offset = scales.of(role).seeded_for(name), None, "zero"
        if config.qat:
            fn = config.qat.activations
            scheme, offset = config.qat.offset(role, scheme)
            scale = scale.for_qat(config.qat.range_init, fn.int_range)
        specs = tuple(QuantSpec(b, scheme) for b in widths(bits))
        return ActivationConfig(specs, scale, fn, offset) if specs else None

    table: dict[str, LayerConfig] = {}
    for name, layer in structure.layers.items():
        bits = config.bits_of(layer)
        if bits.weight or bits.input or bits.output:
            table[name] = LayerConfig(
                config.grids.weight(bits.weight),
                activation(f"{name}.input", bits.input, layer.role),
                activation(f"{name}.output", bits.output, layer.role),
                layer.split if config.split_shortcuts else None,
            )
    operands: dict[str, dict[str, ActivationConfig]] = {}
    for name in attentions:
        parts = {part: activation(f"{name}.{part}", config.attention.operands, None) for part in OPERANDS}
        probabilities = activation(f"{name}.probabilities", config.attention.probabilities, None, "unsigned")
        if quantized := {part: line for part, line in {**parts, "probabilities": probabilities}.items() if line}:
            operands[name] = quantized
    if not table and not operands:
        raise ValueError("this configuration quantizes nothing: every role is float")
    tied = tied_layers(structure, table) if config.tie_qkv else ()
    trained = config.qat.weights if config.qat else None
    return ResolvedConfig(table, operands, timesteps, config.outside_timesteps, tied, trained)


def tied_layers(structure: NetworkStructure, table: Mapping[str, LayerConfig]) -> tuple[tuple[str, ...], ...]:
    """Layers whose input quantizers learn together: q, k and v of every attention."""
    if structure.by_role(Role.FEED_FORWARD):
        raise ValueError("tie_qkv is for networks without transformer blocks, whose q, k and v have one input")
    groups: dict[str, list[str]] = {}
    for layer in structure.by_role(Role.ATTN_QKV):
        if layer.name in table and table[layer.name].input:
            groups.setdefault(layer.name.rpartition(".")[0], []).append(layer.name)
    return tuple(tuple(names) for names in groups.values())


def coverage(table: ResolvedConfig, structure: NetworkStructure) -> Mapping[str, Any]:
    """Quantized part of the network: shares of weights and of MACs, and the layers that stay float."""
    everything = structure.layers.values()
    lines = [(structure.layers[name], line) for name, line in table.layers.items()]
    with_weight = [layer for layer, line in lines if line.weight]
    with_input = [layer for layer, line in lines if line.input]
    with_both = [layer for layer, line in lines if line.weight and line.input]
    with_output = [layer for layer, line in lines if line.output]

    def mac_share(layers: list[LayerInfo]) -> float:
        return sum(layer.macs for layer in layers) / sum(layer.macs for layer in everything)

    return {
        "layers": len(everything),
        "weight_share": sum(layer.weights for layer in with_weight) / sum(layer.weights for layer in everything),
        "mac_share_weights": mac_share(with_weight),
        "mac_share_weights_and_inputs": mac_share(with_both),
        "mac_share_outputs": mac_share(with_output),
        "float_weights": [layer.name for layer in everything if layer not in with_weight],
        "float_inputs": [layer.name for layer in everything if layer not in with_input],
        "attention_operands": sorted({part for parts in table.operands.values() for part in parts}),
    }
