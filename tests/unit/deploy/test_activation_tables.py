"""Every kind of activation quantizer: its table is what the quantizer does, and both engines multiply its codes."""

from typing import NamedTuple

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
from tfmq_exp.deploy.weight_tables import NotRepresentableError, per_row
from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil
from tfmq_exp.quant.qat_quantizers import Offset, TrainableQuantizer
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, StepSwitch
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
