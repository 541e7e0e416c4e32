"""Whole networks of torchao's products, and what is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.deployed import inputs, weight
from tests.unit.deploy.test_torchao import CPU, GPU, grid_at, models, network  # noqa: F401 - fixtures
from tfmq_exp.deploy import engine
from tfmq_exp.deploy.activation_tables import ScaleTable
from tfmq_exp.deploy.engine import read_manifest
from tfmq_exp.deploy.layers import DeployedLayer, DeployedProduct, ProductLayer
from tfmq_exp.deploy.torchao import products as torchao_products
from tfmq_exp.deploy.torchao.engine import TorchAO
from tfmq_exp.deploy.torchao.products import FORMATS, Int8Product, fp8_product, int4_product
from tfmq_exp.deploy.weight_tables import per_row, signed_weight
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

pytest.importorskip("torchao", reason="torchao is not installed")


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
