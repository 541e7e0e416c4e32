"""A UNet as one OpenVINO model: traced by OpenVINO's own front end, with layers of ours in its place for some modules."""

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import openvino.opset13 as ops
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension, ModuleExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from tfmq_exp.deploy.activations import grid_of
from tfmq_exp.deploy.graph import group_norm, padding_of, whole_site
from tfmq_exp.deploy.levels import Node, columns, constant, on_grid
from tfmq_exp.deploy.sites import Site
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.temporal_cache import CachedFeature

Build = Callable[[Node, Mapping[str, Node]], Node]  # (input, the present step's numbers) -> output


@dataclass(frozen=True)
class Converted:
    """A model.

    Args:
        model: OpenVINO's.
        products: names of what must be executed in integers, by site.
        taps: where every site's input and output are, in this object.
    """

    model: Any
    products: Mapping[str, tuple[str, ...]]
    taps: Mapping[str, tuple[Node, Node]]


@dataclass(frozen=True)
class Replacement:
    """What stands for a module in the converted model.

    Args:
        module: in the network.
        shape: of its output, given its input; all that tracing has to know.
        numbers: what changes with the step, each [steps].
        build: makes the operations.
    """

    module: nn.Module
    shape: Callable[[Tensor], Sequence[int]]
    numbers: Mapping[str, Tensor]
    build: Build


class Stepped(nn.Module):
    """(sample, step, conditions) -> noise: a UNet that is told the index of the sampling step."""

    table: Tensor
    timesteps: Tensor

    def __init__(self, unet: nn.Module, timesteps: Sequence[int]) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("timesteps", torch.tensor(timesteps))
        self.register_buffer("table", torch.zeros(len(timesteps), 1))
        self.row: tuple[Tensor, ...] = ()  # the present step's numbers, for the modules inside

    def forward(self, sample: Tensor, step: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """`step` is one number for the whole batch."""
        self.row = self.table[step].split(1)
        conditions = {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states}
        return self.unet(sample, self.timesteps[step].expand(sample.shape[0]), **conditions).sample


def converted(
    model: QuantizedUNet, sites: Sequence[Site], example: Mapping[str, Tensor], *, pairs_saturate: bool = False
) -> Converted:
    """A quantized UNet as an OpenVINO model with inputs `sample`, `step` and its conditions; any batch.

    Args:
        model: finished; weights frozen, sources merged.
        sites: what `examine` says of it.
        example: keyword arguments of a forward pass.
        pairs_saturate: see `whole_site`.

    Raises:
        ValueError: a layer that the network calls never or more than once, or whose input is quantized in an unknown way.
    """
    for site in sites:
        if not isinstance(site.layer.input_quantizer, nn.Identity) and any(piece.grid is None for piece in site.pieces):
            raise ValueError(f"the layer {site.name!r} cannot be converted: {site.why}")
    built: list[Built] = []
    replacements = [*site_replacements(sites, built, pairs_saturate), *quantizer_replacements(model, sites)]
    replacements += [cached(module) for module in model.unet.modules() if isinstance(module, CachedFeature)]
    result = traced(model.unet, model.context.timesteps, replacements, example)
    calls = Counter(one.site for one in built)
    if wrong := [site.name for site in sites if calls[site.name] != 1]:
        raise ValueError(f"{len(wrong)} layers are not called exactly once, first {wrong[0]!r}")
    products: dict[str, tuple[str, ...]] = {}
    for one in built:
        names = tuple(f"{one.site}/product{i}" for i in range(len(one.products)))
        for product, name in zip(one.products, names, strict=True):
            product.set_friendly_name(name)
        if names:
            products[one.site] = names
    taps = {one.site: (one.reader[0].input_value(one.reader[1]), one.output.output(0)) for one in built}
    return Converted(result, products, taps)


@dataclass(frozen=True)
class Built:
    """What was made of a site.

    Args:
        site: its name.
        reader: an operation that reads the site's input, and as which of its own. Not the port, which does not keep the
            operation alive.
        output: the last operation.
        products: those in integers.
    """

    site: str
    reader: tuple[Node, int]
    output: Node
    products: Sequence[Node]


def converted_float(unet: nn.Module, timesteps: Sequence[int], example: Mapping[str, Tensor]) -> Any:
    """A float UNet as an OpenVINO model of the same form, to compare with."""
    return traced(unet, timesteps, [], example)


def site_replacements(sites: Sequence[Site], built: list[Built], pairs_saturate: bool) -> list[Replacement]:
    """Quantized layers. `built` is filled while the model is converted."""

    def build(site: Site, x: Node, at: Mapping[str, Node]) -> Node:
        others = {port.get_node().get_name() for port in x.get_target_inputs()}
        y, products = whole_site(site, x, at, pairs_saturate=pairs_saturate)
        reader = next(port for port in x.get_target_inputs() if port.get_node().get_name() not in others)
        built.append(Built(site.name, (reader.get_node(), reader.get_index()), y, products))
        return y

    replacements: list[Replacement] = []
    for site in sites:
        parts = {f"{i}.{name}": v for i, piece in enumerate(site.pieces) for name, v in columns(piece.grid).items()}
        parts |= {f"output.{name}": v for name, v in columns(site.output).items()}
        replacements.append(Replacement(site.layer, partial(output_shape, site.layer), parts, partial(build, site)))
    return replacements


def quantizer_replacements(model: QuantizedUNet, sites: Sequence[Site]) -> list[Replacement]:
    """Quantizers outside quantized layers: of attention's operands."""
    inside = {id(module) for site in sites for module in site.layer.modules()}
    inside |= {id(choice) for switch in model.switches() for choice in switch.choices}
    replacements: list[Replacement] = []
    for module in model.unet.modules():
        if isinstance(module, AffineQuantizer | StepSwitch) and id(module) not in inside:
            grid = grid_of(module, model.context.num_steps)
            build = partial(lambda grid, x, at: on_grid(x, grid, at), grid)
            replacements.append(Replacement(module, lambda x: x.shape, columns(grid), build))
    return replacements


def cached(module: CachedFeature) -> Replacement:
    """A stored feature, looked up by the index of the step; one row for the whole batch."""
    table, steps = constant(module.table), torch.arange(len(module.table))
    width = module.table.shape[1]

    def build(_: Node, at: Mapping[str, Node]) -> Node:
        return ops.gather(table, ops.convert(at["step"], "i64"), ops.constant(0))

    return Replacement(module, lambda _: (1, width), {"step": steps}, build)


def output_shape(layer: nn.Module, x: Tensor) -> Sequence[int]:
    """Of a layer's output, without computing it: while tracing, its parameters must not be touched."""
    if not isinstance(layer, nn.Conv2d):
        return (*x.shape[:-1], layer.out_features)  # type: ignore[arg-type]
    padding, sizes = padding_of(layer), zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ends = [
        (int(size) + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for pad, (size, kernel, dilation, stride) in zip(padding, sizes, strict=True)
    ]
    return (int(x.shape[0]), layer.out_channels, *ends)


def traced(
    unet: nn.Module, timesteps: Sequence[int], replacements: Sequence[Replacement], example: Mapping[str, Tensor]
) -> Any:
    """Convert with replacements; the network itself is left as it was."""
    stepped = Stepped(unet, timesteps)
    norms = [
        Replacement(module, lambda x: x.shape, {}, partial(lambda norm, x, at: group_norm(norm, x), module))
        for module in unet.modules()
        if isinstance(module, nn.GroupNorm)
    ]
    numbers: list[Tensor] = []
    frontend: Any = FrontEndManager().load_by_framework("pytorch")
    modules: dict[nn.Module, ModuleExtension] = {}
    for i, replacement in enumerate([*replacements, *norms]):
        first = len(numbers)
        numbers += replacement.numbers.values()
        own = partial(row_slice, stepped, first, len(numbers))
        modules[replacement.module], operation = replaced(f"tfmq_exp::op{i}", replacement, own)
        frontend.add_extension(operation)
    if numbers:
        stepped.table = torch.stack(numbers, dim=1).to(torch.float32)
    inputs = {("step" if name == "timestep" else name): value for name, value in example.items()}
    inputs["step"] = torch.tensor(0)
    with restored(unet), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes that become constants are those of the network
        # what `openvino.convert_model` does too, but for a second trace and minutes of preparing no preprocessing
        decoder = TorchScriptPythonDecoder(
            stepped, example_input=inputs, module_extensions=modules, trace_kwargs={"check_trace": False}
        )
        model = frontend.convert(frontend.load(decoder))
    shapes = {name: [-1, *value.shape[1:]] if name != "step" else [] for name, value in inputs.items()}
    model.reshape({port: shapes[port.get_any_name()] for port in model.inputs})
    return model


def row_slice(stepped: Stepped, start: int, stop: int) -> tuple[Tensor, ...]:
    """Some of the present step's numbers."""
    return stepped.row[start:stop]


def replaced(kind: str, replacement: Replacement, numbers: Callable[[], tuple[Tensor, ...]]) -> tuple[Any, Any]:
    """OpenVINO's two extensions for one module: it is one operation of a kind of its own, which becomes ours."""
    names = list(replacement.numbers)

    def operations(context: Any) -> Any:
        at = {name: context.get_input(i + 1) for i, name in enumerate(names)}
        return replacement.build(context.get_input(0), at).outputs()

    module = ModuleExtension(
        replacement.module,
        kind,
        evaluate=lambda _, x, *__: torch.zeros(replacement.shape(x)),
        convert=lambda _, operation, x, *__: operation(x, *numbers()),
    )
    return module, ConversionExtension(kind, operations)


@contextmanager
def restored(unet: nn.Module) -> Generator[None]:
    """Take back what OpenVINO's module extensions leave on the modules."""
    before = {id(module): dict(module.__dict__) for module in unet.modules()}
    try:
        yield
    finally:
        for module in unet.modules():
            for name in set(module.__dict__) - set(before[id(module)]):
                del module.__dict__[name]
