"""torchao's products: int8 is the simulation, fp8 and int4 are what they are said to be; on the CPU, and on a GPU where there is one."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao", reason="torchao is not installed")

from tests.helpers.deployed import CASES as SHARED
from tests.helpers.deployed import inputs, layer_inputs, model_of, one_level_unet, weight
from tfmq_exp.deploy.activation_tables import ScaleTable
from tfmq_exp.deploy.layers import DeployedLayer, DeployedProduct, ProductLayer, deployed_layers
from tfmq_exp.deploy.torchao import products as torchao_products
from tfmq_exp.deploy.torchao.products import FORMATS, Int8Product, fp8_product, int4_product, safe_int_mm
from tfmq_exp.deploy.weight_tables import per_row, signed_weight
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

CPU = torch.device("cpu")
GPU = pytest.param(torch.device("cuda"), marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
])  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **SHARED,
    "outputs on grids": {"output": 8, "scales": "all"},
    "float inputs": {"activation": None},
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return one_level_unet()


@pytest.fixture(scope="module")
def models(network: nn.Module) -> Mapping[str, QuantizedNetwork]:
    made = {case: model_of(network, **choices) for case, choices in CASES.items()}
    made["bits chosen by step"].use_bits([4, 8, 6, 4])
    return made


def layers(model: QuantizedNetwork, dtype: str, device: torch.device) -> list[tuple[DeployedLayer, Tensor, Tensor]]:
    """Every layer that is executed in a dtype: its input in the simulation, and its output."""
    given = inputs(501, 1, 501)
    seen, found = layer_inputs(model, given), []
    model.to(device)
    with model.context.at(given["timestep"].to(device)), torch.no_grad():
        for deployed in deployed_layers(model):
            if products := FORMATS[dtype].products(deployed, device):
                layer = ProductLayer(deployed, products, model.context).to(device)
                found.append((deployed, seen[deployed.name], layer(seen[deployed.name].to(device)).cpu()))
    model.cpu()
    return found


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "float inputs"])
def test_int8_layers_are_those_of_the_simulation(
    models: Mapping[str, QuantizedNetwork], case: str, device: torch.device
) -> None:
    """Rows at different steps, fewer than the kernel takes; shortcuts of 1x1 among the layers. All sizes are what CUDA wants."""
    model, sizes = models[case], []

    def noted(rows: Tensor, matrix: Tensor) -> Tensor:
        sizes.append((len(rows), *matrix.shape))
        return safe_int_mm(rows, matrix)

    with mock.patch.object(torchao_products, "safe_int_mm", noted):
        found = layers(model, "int8", device)
    assert len(found) == 25
    assert sum(isinstance(deployed.layer, nn.Conv2d) for deployed, *_ in found) == 2
    with model.context.at(inputs(501, 1, 501)["timestep"]), torch.no_grad():
        for deployed, x, y in found:
            expected = deployed.layer(x)
            beyond = (y - expected).abs() > 5e-6 * expected.abs().max()
            assert beyond.double().mean() < (1e-3 if deployed.output else 1e-9), (
                deployed.name
            )  # an output at a tie may be rounded either way
    assert all(rows > 16 and inner % 8 == 0 and out % 8 == 0 for rows, inner, out in sizes)


def e4m3(x: Tensor) -> Tensor:
    """The nearest number of three bits behind the leading one, ties to even; 2^-9 apart below 2^-6."""
    _, exponent = torch.frexp(x.double())
    step = torch.exp2(torch.clamp(exponent - 4, min=-9).double())
    return (x.double() / step).round() * step


def plain(parts: tuple[QuantizedWeight, ...]) -> list[tuple[Tensor, Tensor]]:
    """Scale, and code minus zero point, as matrices in float64."""
    values = [(part.codes.double() + part.spec.qmin - part.qparams.zero_point.double()).flatten(1) for part in parts]
    return [(part.qparams.scale.double().reshape(-1, 1), value) for part, value in zip(parts, values, strict=True)]


def slow(dtype: str, parts: tuple[QuantizedWeight, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """What a dtype says it computes, channels last and without bias, in float64; and the size of what bfloat16 rounds."""
    total, rounded = torch.zeros(()), torch.zeros(())
    pieces = x.split([value.shape[1] for _, value in plain(parts)], dim=-1)
    for piece, (scale, value) in zip(pieces, plain(parts), strict=True):
        rows = piece.bfloat16()
        if dtype == "fp8":
            unit = (rows.abs().amax(-1, keepdim=True) / 448).float()
            y = (e4m3(rows.float() / unit) * unit.double()) @ (scale * e4m3(value)).T
        else:
            y = rows.double() @ (scale * value).T
        total, rounded = total + y, rounded + y.abs()
    return total, rounded


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        ("fp8", "tables for all layers"),
        ("fp8", "eight bits"),
        ("fp8", "split"),
        ("int4", "tables for all layers"),
        ("int4", "split"),
        ("int4", "float inputs"),
    ],
)
def test_fp8_and_int4_are_what_they_are_said_to_be(
    models: Mapping[str, QuantizedNetwork], dtype: str, case: str, device: torch.device
) -> None:
    """But for the last bit of bfloat16, in which products leave the kernel, and float32 sums."""
    model = models[case]
    found = layers(model, dtype, device)
    assert len(found) == 25
    for deployed, x, y in found:
        axis = 1 if isinstance(deployed.layer, nn.Conv2d) else -1
        expected, rounded = slow(dtype, model.integers[deployed.name], x.movedim(axis, -1))
        assert deployed.layer.bias is not None
        allowed = 2**-8 * rounded + 1e-5 * rounded.amax()
        assert ((y.movedim(axis, -1).double() - deployed.layer.bias.double() - expected).abs() <= allowed).all(), (
            deployed.name
        )  # type: ignore[operator]


def grid_at(scale: list[float], zero_point: list[float], **further: float) -> ScaleTable:
    numbers = {"lowest": -100.0, "highest": 155.0, "gain": 1.0, "offset": 0.0, "pruned": 0.0, **further}
    return ScaleTable(torch.tensor(scale), torch.tensor(zero_point), *(torch.full((2,), v) for v in numbers.values()))


@pytest.mark.parametrize("zero_point", [0.0, 97.0, 255.0])
@pytest.mark.parametrize("offset", [0.0, -0.375])
def test_int8_with_all_that_a_grid_can_have(zero_point: float, offset: float) -> None:
    """Weights that need more than a signed byte, odd sizes, a gain, a centre: against integers put together in float64."""
    parts = weight(8, "affine", zero_point, (22, 37))
    grid = grid_at([0.5, 0.03125], [-7.0, 120.0], gain=1.5, offset=offset)
    steps = torch.tensor([1, 0, 1])
    codes = torch.randint(-100, 156, (3, 5, 37), generator=torch.Generator().manual_seed(0)).double()
    x = (per_row(grid.scale[steps], 3) * (codes - per_row(grid.zero_point[steps], 3)) + offset).float()
    real = 1.5 * (x.double() - offset) + offset
    ((scale, value),) = plain((parts,))
    expected = real @ (scale * value).T
    found = Int8Product(DeployedProduct(37, signed_weight(parts), grid), -1, CPU)(x, steps)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("zero_point", [7.0, 19.0, 200.0])
def test_nothing_is_lost_where_a_format_is_exact(zero_point: float) -> None:
    """Inputs and sums that bfloat16 holds, all codes of four bits, zero points outside of them, scales that no short float holds."""
    parts = weight(4, "affine", zero_point, (22, 37))
    ((scale, value),) = plain((parts,))
    x = torch.zeros(3, 37)
    x[0, 5], x[1, 36] = 448.0, -448.0  # the third row is zero
    expected = x.double() @ (scale * value).T
    piece, steps = DeployedProduct(37, signed_weight(parts), None), torch.zeros(3, dtype=torch.long)
    assert torch.allclose(int4_product(piece, -1, CPU)(x, steps).double(), expected, rtol=2**-8, atol=0)
    small = x / 448
    assert torch.allclose(int4_product(piece, -1, CPU)(small, steps).double(), expected / 448, rtol=2**-23, atol=0)
    assert torch.allclose(fp8_product(piece, -1, CPU)(x, steps)[2], torch.zeros(22))
