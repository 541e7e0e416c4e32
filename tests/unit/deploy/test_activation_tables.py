"""Every kind of activation quantizer: its table is what the quantizer does, and both engines multiply its codes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS
from tfmq_exp.deploy.activation_tables import (
    RuntimeScale,
    ScaleTable,
    activation_scale,
    check_bytes,
)
from tfmq_exp.deploy.layers import DeployedLayer, DeployedProduct, ProductLayer
from tfmq_exp.deploy.onednn import available, onednn_products, pairs_saturate
from tfmq_exp.deploy.weight_tables import NotRepresentableError, per_row, signed_weight
from tfmq_exp.quant.layers import QUANT_LAYERS, QuantLayer
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil
from tfmq_exp.quant.qat_quantizers import Offset, TrainableQuantizer
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, StepSwitch, WeightQuantizer
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig, DynamicGeneratorConfig
from tfmq_exp.quant.scales.generator import Frequency
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import TimestepContext

STEPS = torch.arange(len(TIMESTEPS))
SCALES: dict[str, ScaleConfig] = {
    "static": StaticConfig(),
    "per step": PerStepConfig(),
    "intervals": TimestepGroupConfig(2, 1000),
    "sample": DynamicConfig("sample"),
    "sample, fewer levels": DynamicConfig("sample", int_range="tdq_release"),
    "tensor": DynamicConfig("tensor"),
    "statistics": DynamicGeneratorConfig(None, (8, 8), last_layer_init="default"),
    "statistics and time": DynamicGeneratorConfig(Frequency(8), (8,), last_layer_init="default"),
}


class Kind(NamedTuple):
    """A quantizer under training as it is left: function, scale, scheme, bits, offset."""

    fn: QATQuantizeFn
    scale: str
    scheme: Scheme = "symmetric"
    bits: int = 8
    offset: Offset = "zero"


KINDS: dict[str, Kind] = {
    "lsq": Kind(Lsq(), "static"),
    "lsq, 3 bits by interval": Kind(Lsq("tdq_release"), "intervals", bits=3),
    "pact, per step": Kind(Pact(), "per step", bits=4),
    "nipq, about a learned centre": Kind(Nipq(), "static", offset="learned"),
    "lsq behind silu, per step": Kind(Lsq(), "per step", "unsigned", offset="silu"),
    "lsq of the tensor at hand": Kind(Lsq(), "sample"),
    "released lsq of the tensor at hand, behind silu": Kind(
        Lsq("tdq_release"), "sample, fewer levels", "unsigned", 3, "silu"
    ),
    "duq": Kind(Duq(), "static"),
    "duq, per step, about a learned centre": Kind(Duq(), "per step", bits=6, offset="learned"),
    "duq of statistics": Kind(Duq(), "statistics"),
    "qil": Kind(Qil(), "static"),
    "qil behind silu": Kind(Qil(), "static", "unsigned", 4, "silu"),
    "qil, per step": Kind(Qil(), "per step"),
    "qil of the tensor at hand": Kind(Qil(), "tensor", "unsigned", 5),
    "lsq of statistics and time, behind silu": Kind(Lsq("narrow"), "statistics and time", "unsigned", offset="silu"),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(32, 32, 3, padding=1),
    "strided": lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1),
    "linear": lambda: nn.Linear(32, 32),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer_of(kind: Kind, context: TimestepContext) -> TrainableQuantizer:
    """As training may leave it: every number away from where it starts."""
    quantizer = TrainableQuantizer(
        SCALES[kind.scale].build(QuantSpec(kind.bits, kind.scheme), context), kind.fn, kind.offset
    )
    x = noise(2 * len(TIMESTEPS), 32, 6, 6, seed=1)
    with context.at(torch.tensor(2 * TIMESTEPS)):
        quantizer.observe(x + torch.arange(len(x)).reshape(-1, 1, 1, 1) * 0.2)
    for name, value in quantizer.extra.items():
        value.data.copy_(torch.tensor({"gain": 1.17, "pruned": 0.13}[name]))
    quantizer.mode = Mode.QUANTIZE
    quantizer.tabulate()
    return quantizer.eval()


def deployed(kind: Kind, layer: nn.Module, context: TimestepContext) -> DeployedLayer:
    """A layer with four-bit weights behind such a quantizer."""
    quantized: QuantLayer = QUANT_LAYERS[type(layer)].from_float(layer)
    weights = WeightQuantizer(quantized.weight, QuantSpec(4, axis=0), MinMax())
    weights.observe(quantized.weight)
    quantized.weight_quantizer, quantized.input_quantizer = weights, quantizer_of(kind, context)
    (integers,) = quantized.quantized_weight()
    quantized.freeze_weight((integers,))
    grid = activation_scale(quantized.input_quantizer, context.num_steps)
    check_bytes(grid.table)
    return DeployedLayer(
        "layer", quantized.requires_grad_(False), (DeployedProduct(32, signed_weight(integers), grid),), None, ""
    )


def example(name: str, layer: str) -> tuple[DeployedLayer, TimestepContext, Tensor]:
    """The layer, its context, and an input with a row for every step."""
    context = TimestepContext(TIMESTEPS)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = LAYERS[layer]()
    x = noise(len(TIMESTEPS), 32, 6, 6, seed=3) - 0.1
    return deployed(KINDS[name], made, context), context, x.flatten(2).mT.contiguous() if layer == "linear" else x


def dequantized(table: ScaleTable, codes: Tensor) -> Tensor:
    columns = (table.zero_point, table.output_scale, table.offset)
    zero_point, scale, offset = (per_row(column, codes.dim()) for column in columns)
    return (codes - zero_point) * scale + offset


@pytest.mark.parametrize("name", KINDS)
def test_codes_of_the_table_are_the_quantizers(name: str) -> None:
    """Bit by bit, rows at different steps; and each is an integer between the ends."""
    context, kind = TimestepContext(TIMESTEPS), KINDS[name]
    quantizer = quantizer_of(kind, context)
    grid = activation_scale(quantizer, len(TIMESTEPS))
    assert isinstance(grid, ScaleTable | RuntimeScale)
    assert isinstance(grid, RuntimeScale) == kind.scale.startswith(("sample", "tensor", "statistics"))
    x = noise(len(TIMESTEPS), 32, 6, 6) * 1.5
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        rows = grid.of_rows(x, STEPS)
        codes = rows.codes(x)
        assert torch.equal(dequantized(rows, codes), quantizer(x))
    assert torch.equal(codes, codes.round())
    assert quantizer.ints.qmin <= int(codes.min()) < int(codes.max()) <= quantizer.ints.qmax
    assert rows.num_codes == grid.table.num_codes <= 2**kind.bits


def test_a_switch_between_trained_quantizers_is_one_table() -> None:
    context = TimestepContext(TIMESTEPS)
    choices = [quantizer_of(Kind(Qil(), "per step", bits=bits, offset="learned"), context) for bits in (4, 8)]
    switch = StepSwitch(choices, context)
    switch.use([8, 4, 4, 8])
    grid = activation_scale(switch, len(TIMESTEPS))
    assert isinstance(grid, ScaleTable)
    assert grid.highest.tolist() == [127, 7, 7, 127]
    x = noise(len(TIMESTEPS), 8)
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        assert torch.equal(dequantized(grid, grid.codes(x)), switch(x))


def test_an_unknown_form_does_not_pass_for_a_known_one() -> None:
    class Bent(Lsq):
        """Another arithmetic."""

        def for_inference(self) -> "Bent":
            return self

    with pytest.raises(NotRepresentableError, match=r"codes of Bent\(\) are not known; known are .* Lsq"):
        activation_scale(quantizer_of(Kind(Bent(), "static"), TimestepContext(TIMESTEPS)), 4)
    bent = quantizer_of(Kind(Qil(), "static"), TimestepContext(TIMESTEPS))
    bent.fn, bent.extra["gamma"] = Qil(learn_gamma=True), nn.Parameter(torch.tensor(2.0))
    with pytest.raises(NotRepresentableError, match=r"Qil\(pruned, gamma\)"):
        activation_scale(bent, 4)


def test_what_a_byte_does_not_hold() -> None:
    quantizer = AffineQuantizer(SCALES["sample"].build(QuantSpec(9, "symmetric"), TimestepContext(TIMESTEPS)))
    with pytest.raises(NotRepresentableError, match="a grid of 512 integers; a byte has 256"):
        check_bytes(activation_scale(quantizer, len(TIMESTEPS)).table)


CASES = [(name, "padded") for name in KINDS] + [
    (name, layer)
    for name in ("duq, per step, about a learned centre", "lsq of statistics and time, behind silu")
    for layer in ("strided", "linear")
]


@pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN operators for integers")
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_onednn_multiplies_them(name: str, layer: str) -> None:
    one, context, x = example(name, layer)
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        products = onednn_products(one, pairs_saturate())
        expected, found = one.layer(x), ProductLayer(one, products, context)(x)
    assert (found - expected).abs().max() < 3e-6 * expected.abs().max()


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_openvino_multiplies_them(name: str, layer: str) -> None:
    """In integers, and as the simulation at every step but where an input lies at a tie."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.openvino.parity import compare_layer

    one, context, x = example(name, layer)
    run, integer = compiled(one, context, x)
    assert integer
    for step, t in enumerate(TIMESTEPS):
        with context.at(torch.full((len(x),), t)), torch.no_grad():
            row = compare_layer(
                one, context.index, x, torch.from_numpy(run({"sample": x.numpy(), "step": np.array(step)})[0])
            )
        assert (row.unexplained, row.step) == (0, step)
        assert row.beyond < 0.1 * row.outputs
        assert row.error < 0.05


@pytest.mark.parametrize("name", KINDS)
def test_openvino_puts_real_numbers_on_them(name: str) -> None:
    """Operands of attention, outputs, and inputs of layers whose weight is float."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.openvino.graph import RealQuantizer
    from tfmq_exp.deploy.openvino.parity import at_tie

    context, x = TimestepContext(TIMESTEPS), noise(len(TIMESTEPS), 32, 6, 6)
    quantizer = quantizer_of(KINDS[name], context)
    grid = activation_scale(quantizer, len(TIMESTEPS))
    real = RealQuantizer(grid)
    run, _ = executed(real, context, x, real.quantizer.fake_quantize)
    for step, t in enumerate(TIMESTEPS):
        with context.at(torch.full((len(x),), t)), torch.no_grad():
            found, expected = torch.from_numpy(run({"sample": x.numpy(), "step": np.array(step)})[0]), quantizer(x)
            wrong = (found - expected).abs() > 1e-5 * expected.abs().max()
            assert not (wrong & ~at_tie(grid, x, context.index)).any()


def compiled(one: DeployedLayer, context: TimestepContext, x: Tensor) -> tuple[Any, bool]:
    """One layer as OpenVINO executes it, called with x and the step; and whether its product is in integers."""
    from tfmq_exp.deploy.openvino.export import executed_kernels, graph_products

    (product,) = graph_products(one, saturates=False)
    run, (node,) = executed(ProductLayer(one, [product], context), context, x, product.multiply)
    nodes = [n for n in executed_kernels(run) if n.product and any(name.startswith(node) for name in n.nodes)]
    return run, len(nodes) == 1 and nodes[0].integer


def executed(module: nn.Module, context: TimestepContext, x: Tensor, named: Any) -> tuple[Any, list[str]]:
    """A compiled model of x and the step, given what becomes of x; and names of the nodes of one of its operations."""
    import openvino as ov

    from tfmq_exp.deploy.engine import UNetOutput
    from tfmq_exp.deploy.openvino.runtime import compile_settings
    from tfmq_exp.deploy.openvino.trace import trace

    class Network(nn.Module):
        """With the signature of a UNet."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, sample: Tensor, timestep: Tensor) -> UNetOutput:
            return UNetOutput(self.module(sample))

    model, nodes = trace(Network(), context, {"sample": x, "timestep": torch.tensor(0)})
    for node in nodes[named]:
        node.set_friendly_name("product")
    return ov.Core().compile_model(model, "CPU", compile_settings(1, "f32")), ["product" for _ in nodes[named]]
