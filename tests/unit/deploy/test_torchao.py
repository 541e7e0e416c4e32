"""torchao's products: int8 is the simulation, fp8 and int4 are what they are said to be; on the CPU, and on a GPU where there is one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("torchao", reason="torchao is not installed")

from tests.helpers.deployed import CASES as SHARED
from tests.helpers.deployed import inputs, layer_inputs, model_of, one_level_unet, weight
from tfmq_exp.deploy import engine
from tfmq_exp.deploy.activation_tables import ScaleTable
from tfmq_exp.deploy.engine import read_manifest
from tfmq_exp.deploy.layers import DeployedLayer, DeployedProduct, ProductLayer, deployed_layers
from tfmq_exp.deploy.torchao import products as torchao_products
from tfmq_exp.deploy.torchao.engine import TorchAO
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


def test_a_row_says_what_is_executed_and_why_not(models: Mapping[str, QuantizedNetwork], tmp_path: Path) -> None:
    attention, convolution = "mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1"

    def rows(case: str, dtype: str) -> list[dict[str, Any]]:
        TorchAO(dtype, "cpu").export(models[case], {}, tmp_path)
        return read_manifest(tmp_path)["layers"]

    def row(case: str, dtype: str, layer: str) -> Mapping[str, Any]:
        return next(row for row in rows(case, dtype) if row["layer"] == layer)

    assert row("split", "int8", attention)["executed"] == "int8"
    assert row("split", "int8", convolution)["why"] == "torchao has no integer convolution"
    assert row("split", "fp8", convolution)["executed"] == "float"
    assert row("split", "fp8", attention)["note"].startswith("weights exact in e4m3")
    assert row("eight bits", "fp8", attention)["note"].startswith("weights rounded in e4m3")
    assert row("eight bits", "int4", attention)["why"] == "weights of 8 bits; int4 holds 4"
    assert row("float inputs", "int8", attention)["why"] == "its input is not quantized"
    assert row("float inputs", "int4", attention)["executed"] == "int4"
    shared = row("split", "int4", "up_blocks.0.resnets.0.conv_shortcut")
    assert (shared["executed"], shared["products"], shared["weight_bits"]) == ("int4", 2, "4")
    assert len(rows("split", "int4")) == sum(
        isinstance(module, nn.Linear | nn.Conv2d) for module in models["split"].network.modules()
    )


@pytest.mark.parametrize(
    ("dtype", "parts", "reason"),
    [
        ("int4", weight(4, "affine", 300.0, (6, 4)), "292 codes from the middle; the kernel's bfloat16 holds 256"),
        ("fp8", weight(8, "affine", 500.0, (6, 4)), "a weight of 500 steps; e4m3 ends at 448"),
    ],
)
def test_numbers_that_a_format_does_not_hold(dtype: str, parts: QuantizedWeight, reason: str) -> None:
    deployed = DeployedLayer(
        "a", mock.Mock(spec=nn.Linear), (DeployedProduct(4, signed_weight(parts), None),), None, ""
    )
    assert reason in FORMATS[dtype].why_not(deployed)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_the_whole_network(models: Mapping[str, QuantizedNetwork], device: torch.device) -> None:
    """Rounding errors of sums rarely move a code; float arithmetic moves many. The simulation stays what it was."""
    model, given, found = models["tables for all layers"], inputs(501, 1), {}
    with torch.no_grad():
        before = model(**given).sample
        for dtype in FORMATS:
            opened = TorchAO(dtype, str(device)).open(model, Path(), batch=2)
            assert sum(isinstance(module, ProductLayer) for module in opened.modules()) == 25
            found[dtype] = float((opened(**given).sample - before).square().mean() / before.square().mean())
        assert torch.equal(model(**given).sample, before)
    assert found["int8"] < 1e-4 < found["int4"] < found["fp8"] < 1e-2


def test_sizes_and_devices_pass_torchs_checks_for_cuda() -> None:
    """Tensors without numbers, said to be on a GPU: operators check shapes, types and devices of what they would be given."""
    piece = DeployedProduct(37, signed_weight(weight(4, "affine", 7.0, (22, 37))), grid_at([0.5, 0.25], [0.0, 9.0]))
    int8 = Int8Product(piece, 1, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        device = torch.device("cuda")
        for name, value in list(vars(int8).items()):
            setattr(int8, name, value.to(device) if isinstance(value, Tensor) else value)
        int8.input = ScaleTable(*(column.to(device) for column in int8.input))  # type: ignore[union-attr]
        x, steps = torch.empty(3, 37, 5, 5, device=device), torch.zeros(3, dtype=torch.long, device=device)
        with mock.patch.object(
            ScaleTable, "scaled", lambda table, x: x / per_row(table.scale, x.dim())
        ):  # the true one looks at numbers
            found = [int8(x, steps), *(made(piece, 1, device)(x, steps) for made in (fp8_product, int4_product))]
        for y in found:
            assert (tuple(y.shape), y.dtype, y.device.type) == ((3, 22, 5, 5), torch.float32, "cuda")


def test_what_is_missing_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device.*engine=openvino or engine=onednn"):
        TorchAO("int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A10")
    made = TorchAO("int4")
    assert (made.identity["dtype"], made.identity["device"]) == ("int4", "cuda")
    with pytest.raises(ValueError, match=r"engine.dtype=fp8 needs .* 8.9 or more; A10 has 8.6"):
        TorchAO("fp8")
    with pytest.raises(ValueError, match=r"engine.dtype must be int8, fp8, int4, got 'int2'"):
        TorchAO("int2", "cpu")
    monkeypatch.setattr(engine, "version", mock.Mock(side_effect=engine.PackageNotFoundError))
    with pytest.raises(ValueError, match=r"pip install 'tfmq_exp\[torchao\]'"):
        TorchAO("int8")


def test_an_integer_product_that_is_none_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao multiplies in float32, without a word, where CUDA's kernel fails."""
    monkeypatch.setattr(torchao_products, "safe_int_mm", lambda a, b: (a.float() @ b.float()).to(torch.int32))
    with pytest.raises(ValueError, match="for 33016063"):
        TorchAO("int8", "cpu").open(mock.Mock(), Path(), batch=1)
