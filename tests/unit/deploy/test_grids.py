"""Every kind of grid: its record says what the quantizer does, and both engines multiply its codes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS
from tfmq_exp.deploy.activations import Grid, LiveGrid, Rule, StepGrid, grid_of
from tfmq_exp.deploy.onednn_engine import IntegerLayer, available, saturating
from tfmq_exp.deploy.sites import Piece, Site
from tfmq_exp.deploy.weights import DoesNotFit, signed_weight
from tfmq_exp.quant.layers import QUANT_LAYERS, QuantLayer
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.qat.base import QATQuantizeFn
from tfmq_exp.quant.qat.duq import Duq
from tfmq_exp.quant.qat.lsq import Lsq
from tfmq_exp.quant.qat.nipq import Nipq
from tfmq_exp.quant.qat.pact import Pact
from tfmq_exp.quant.qat.qil import Qil
from tfmq_exp.quant.quantizers.affine import WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.quant.quantizers.trainable import Offset, TrainableQuantizer
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.dynamic_generator import DynamicGeneratorConfig
from tfmq_exp.quant.scales.per_step import PerStepConfig
from tfmq_exp.quant.scales.static import StaticConfig
from tfmq_exp.quant.scales.timestep_groups import TimestepGroupConfig
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.quant.timestep_encoding import Frequency

STEPS = torch.arange(len(TIMESTEPS))
SCALES: dict[str, ScaleConfig] = {
    "static": StaticConfig(),
    "per step": PerStepConfig(),
    "intervals": TimestepGroupConfig(2, 1000),
    "sample": DynamicConfig("sample"),
    "sample, fewer levels": DynamicConfig("sample", "tdq_release"),
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


def site(kind: Kind, layer: nn.Module, context: TimestepContext) -> Site:
    """A layer with four-bit weights behind such a quantizer."""
    own: QuantLayer = QUANT_LAYERS[type(layer)].from_float(layer)
    weights = WeightQuantizer(own.weight, QuantSpec(4, axis=0), MinMax())
    weights.observe(own.weight)
    own.weight_quantizer, own.input_quantizer = weights, quantizer_of(kind, context)
    (integers,) = own.quantized_weight()
    own.freeze_weight((integers,))
    grid = grid_of(own.input_quantizer, context.num_steps)
    grid.check_bytes()
    return Site("layer", own.requires_grad_(False), (Piece(32, signed_weight(integers), grid),), None, "")


def subject(name: str, layer: str) -> tuple[Site, TimestepContext, Tensor]:
    """The site, its context, and an input with a row for every step."""
    context = TimestepContext(TIMESTEPS)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = LAYERS[layer]()
    x = noise(len(TIMESTEPS), 32, 6, 6, seed=3) - 0.1
    return site(KINDS[name], made, context), context, x.flatten(2).mT.contiguous() if layer == "linear" else x


@pytest.mark.parametrize("name", KINDS)
def test_codes_of_the_record_are_the_quantizers(name: str) -> None:
    """Bit by bit, rows at different steps; and each is an integer between the ends."""
    context, kind = TimestepContext(TIMESTEPS), KINDS[name]
    quantizer = quantizer_of(kind, context)
    grid = grid_of(quantizer, len(TIMESTEPS))
    assert isinstance(grid, StepGrid | LiveGrid)
    assert isinstance(grid, LiveGrid) == kind.scale.startswith(("sample", "tensor", "statistics"))
    x = noise(len(TIMESTEPS), 32, 6, 6) * 1.5
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        rows = grid.of_rows(x, STEPS)
        codes = rows.codes(x)
        assert torch.equal(rows.real(codes), quantizer(x))
    assert torch.equal(codes, codes.round())
    assert quantizer.ints.qmin <= int(codes.min()) < int(codes.max()) <= quantizer.ints.qmax
    assert rows.width == grid.width <= 2**kind.bits


def test_a_switch_between_trained_quantizers_is_one_table() -> None:
    context = TimestepContext(TIMESTEPS)
    choices = [quantizer_of(Kind(Qil(), "per step", bits=bits, offset="learned"), context) for bits in (4, 8)]
    switch = StepSwitch(choices, context)
    switch.use([8, 4, 4, 8])
    grid = grid_of(switch, len(TIMESTEPS))
    assert isinstance(grid, StepGrid)
    assert grid.highest.tolist() == [127, 7, 7, 127]
    x = noise(len(TIMESTEPS), 8)
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        assert torch.equal(grid.real(grid.codes(x)), switch(x))


def test_an_unknown_form_does_not_pass_for_a_known_one() -> None:
    class Bent(Lsq):
        """Another arithmetic."""

        def for_inference(self) -> "Bent":
            return self

    with pytest.raises(DoesNotFit, match=r"under the form Bent\(\), whose codes are not known; known are .* Lsq"):
        grid_of(quantizer_of(Kind(Bent(), "static"), TimestepContext(TIMESTEPS)), 4)
    bent = quantizer_of(Kind(Qil(), "static"), TimestepContext(TIMESTEPS))
    bent.fn, bent.extra["gamma"] = Qil(learn_gamma=True), nn.Parameter(torch.tensor(2.0))
    with pytest.raises(DoesNotFit, match=r"Qil\(pruned, gamma\)"):
        grid_of(bent, 4)


def test_what_a_byte_does_not_hold() -> None:
    wide = LiveGrid(SCALES["sample"].build(QuantSpec(9, "symmetric"), TimestepContext(TIMESTEPS)), Rule(-256, 255))  # type: ignore[arg-type]
    with pytest.raises(DoesNotFit, match="a grid of 512 integers; a byte has 256"):
        wide.check_bytes()


CASES = [(name, "padded") for name in KINDS] + [
    (name, layer)
    for name in ("duq, per step, about a learned centre", "lsq of statistics and time, behind silu")
    for layer in ("strided", "linear")
]


@pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN operators for integers")
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_onednn_multiplies_them(name: str, layer: str) -> None:
    one, context, x = subject(name, layer)
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        wanted, found = one.layer(x), IntegerLayer(one, context, saturating())(x)
    assert (found - wanted).abs().max() < 3e-6 * wanted.abs().max()


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_openvino_multiplies_them(name: str, layer: str) -> None:
    """In integers, and as the simulation at every step but where an input lies at a tie."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.agreement import compared

    one, context, x = subject(name, layer)
    run, integer = compiled(one, list(x.shape[1:]))
    assert integer
    for step, t in enumerate(TIMESTEPS):
        with context.at(torch.full((len(x),), t)), torch.no_grad():
            row = compared(one, context.index, x, torch.from_numpy(run([x.numpy(), step])[0]))
        assert (row.unexplained, row.step) == (0, step)
        assert row.beyond < 0.1 * row.outputs
        assert row.error < 0.05


@pytest.mark.parametrize("name", KINDS)
def test_openvino_puts_real_numbers_on_them(name: str) -> None:
    """Operands of attention, outputs, and inputs of layers whose weight is float."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.agreement import at_tie
    from tfmq_exp.deploy.levels import on_grid

    context, x = TimestepContext(TIMESTEPS), noise(len(TIMESTEPS), 32, 6, 6)
    quantizer = quantizer_of(KINDS[name], context)
    grid = grid_of(quantizer, len(TIMESTEPS))
    run = stepped(grid, list(x.shape[1:]), lambda x, at: on_grid(x, grid, at))
    for step, t in enumerate(TIMESTEPS):
        with context.at(torch.full((len(x),), t)), torch.no_grad():
            found, wanted = torch.from_numpy(run([x.numpy(), step])[0]), quantizer(x)
            wrong = (found - wanted).abs() > 1e-5 * wanted.abs().max()
            assert not (wrong & ~at_tie(grid, x, context.index)).any()


def compiled(one: Site, shape: list[int]) -> tuple[Any, bool]:
    """One layer as OpenVINO executes it, called with x and the step; and whether its product is in integers."""
    from tfmq_exp.deploy.execution import executed
    from tfmq_exp.deploy.graph import whole_site

    def build(x: Any, at: Mapping[str, Any]) -> Any:
        y, (product,) = whole_site(one, x, {f"0.{name}": node for name, node in at.items()})
        product.set_friendly_name("product")
        return y

    run = stepped(one.pieces[0].grid, shape, build)
    nodes = [n for n in executed(run) if n.product and any(layer.startswith("product") for layer in n.layers)]
    return run, len(nodes) == 1 and nodes[0].integer


def stepped(grid: Grid | None, shape: list[int], build: Callable[[Any, Mapping[str, Any]], Any]) -> Any:
    """A compiled model of x and the step, given what becomes of x and of the step's numbers."""
    import numpy as np
    import openvino as ov
    import openvino.opset13 as ops

    from tfmq_exp.deploy.levels import columns, constant
    from tfmq_exp.deploy.loader import settings

    x, step = ops.parameter([-1, *shape], np.float32), ops.parameter([], np.int64)
    at = {name: ops.gather(constant(part), step, ops.constant(0)) for name, part in columns(grid).items()}
    model: Any = ov.Model([build(x.output(0), at)], [x, step])  # pyright: ignore[reportGeneralTypeIssues]
    return ov.Core().compile_model(model, "CPU", settings(1, "f32"))
