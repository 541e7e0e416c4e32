"""OpenVINO executes what the simulation computes: layer by layer, in integers, for every kind of grid."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import calibrated, example_inputs, quantizable
from tests.helpers.deployed import inputs, model_of, one_level_unet, small_unet
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.stored_features import CachedFeature, cached
from tfmq_exp.surgery.config import AttentionBits, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network

pytest.importorskip("openvino", reason="openvino is not installed")

from tfmq_exp.deploy.activation_tables import activation_scale
from tfmq_exp.deploy.openvino.engine import OpenVINO
from tfmq_exp.deploy.openvino.export import (
    ConvertedModel,
    ExecutedKernel,
    check_integer,
    convert,
    export,
    pairs_saturate,
)
from tfmq_exp.deploy.openvino.parity import at_tie, compare_layers
from tfmq_exp.deploy.openvino.runtime import ExportedUNet, compile_settings

RUNTIME = Path(__file__).parents[3] / "tfmq_exp/deploy/openvino/runtime.py"
DYNAMIC = DynamicConfig("sample")
CASES: dict[str, dict[str, Any]] = {
    "static, eight bits": {"weight": 8, "scales": "none"},
    "bits chosen by step, split, attention": {
        "activation": [4, 6, 8],
        "scales": "all",
        "split": True,
        "attention": AttentionBits(8, 8),
    },
    "ranges at run time": {"scales": ScalePlan(DYNAMIC, DYNAMIC)},
    "outputs": {"activation": None, "output": 8, "scales": "all"},
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return one_level_unet()


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "deployed.json").read_text())


@pytest.fixture(scope="module")
def model() -> QuantizedNetwork:
    return model_of(small_unet(), scales="all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def found(model: QuantizedNetwork, folder: Path) -> ConvertedModel:
    return export(model, inputs(501), folder, split_int8_weights=pairs_saturate(), threads=1)


def check_agreement(model: QuantizedNetwork, given: Mapping[str, torch.Tensor]) -> None:
    """Differences beyond 1e-5 of the largest output only where a number lies at a tie between two codes."""
    rows = compare_layers(
        model,
        given,
        steps=(1, 3),
        layers=list(model.plan.layers),
        split_int8_weights=pairs_saturate(),
        threads=1,
    )
    assert len(rows) == 2 * len(model.plan.layers)
    assert not [row for row in rows if row.unexplained]
    assert sum(row.beyond for row in rows) < 0.01 * sum(row.outputs for row in rows)
    assert max(row.error for row in rows) < 0.03


def test_tables_for_all_layers(found: ConvertedModel, model: QuantizedNetwork, folder: Path) -> None:
    check_agreement(model, inputs(501))
    assert set(found.products) == set(model.plan.layers)
    assert {row["executed"] for row in manifest_of(folder)["layers"]} == {"int8"}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_agrees_with_its_simulation(tmp_path: Path, network: nn.Module, case: str) -> None:
    model = model_of(network, **CASES[case])
    if model.switches():
        model.use_bits([4, 8, 6, 4])
    given = inputs(501, 501)
    found = export(model, given, tmp_path, split_int8_weights=pairs_saturate(), threads=1)
    manifest, count = manifest_of(tmp_path), 0 if case == "outputs" else len(model.plan.layers)
    assert sum(row["executed"] == "int8" for row in manifest["layers"]) == count
    assert len(found.products) == count
    assert any(kernel.endswith("8") for kernel in manifest["kernels"]) == (case != "outputs")
    check_agreement(model, given)


def test_the_whole_model_alone_in_another_process(
    tmp_path: Path, model: QuantizedNetwork, found: ConvertedModel, folder: Path
) -> None:
    """With numpy and openvino and nothing of ours but the runtime; another batch than the exported one, and an odd rest."""
    given = inputs(501, 501, 501)
    np.save(tmp_path / "x.npy", given["sample"].numpy())
    program = f"""
import importlib.util, sys
from pathlib import Path
import numpy as np
spec = importlib.util.spec_from_file_location("runtime", {str(RUNTIME)!r})
runtime = importlib.util.module_from_spec(spec); spec.loader.exec_module(runtime)
unet = runtime.ExportedUNet(Path({str(folder)!r}), batch=2, threads=1)
np.save({str(tmp_path / "y.npy")!r}, unet(np.load({str(tmp_path / "x.npy")!r}), 501))
assert not {{"torch", "tfmq_exp", "diffusers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    with torch.no_grad():
        expected = model(**given).sample
    # a few codes at ties move all that follows; one wrong layer moves it by more than that
    assert relative(torch.from_numpy(np.load(tmp_path / "y.npy")), expected) < 1e-3


def test_rows_at_several_steps(model: QuantizedNetwork, found: ConvertedModel, folder: Path) -> None:
    mixed = inputs(751, 1, 751)
    opened: Any = OpenVINO(1, "f32", None).open(model, folder, batch=2)
    with torch.no_grad():
        expected = model(**mixed).sample
    assert relative(opened(**mixed).sample, expected) < 1e-3
    with pytest.raises(ValueError, match="timestep 500 is none of the 4 exported ones"):
        opened.exported(mixed["sample"].numpy(), 500)


def relative(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x - expected).square().mean() / expected.square().mean())


def test_bytes_on_the_disk(model: QuantizedNetwork, found: ConvertedModel, folder: Path) -> None:
    stored = manifest_of(folder)["bytes"]
    weights = sum(model.layer(name).weight.numel() for name in model.plan.layers)
    channels = sum(len(model.layer(name).weight) for name in model.plan.layers)
    assert stored["u4"] == weights // 2
    assert stored["i8"] <= channels  # zero points
    assert stored["f32"] < 4 * (6 * channels + 3000)  # scales, sums, biases, norms, tables


def test_conditional_networks_and_stored_features(tmp_path: Path, tiny_conditional_unet: nn.Module) -> None:
    model = model_of(tiny_conditional_unet, scales="all")
    layer = "down_blocks.0.resnets.0.time_emb_proj"
    width = len(model.layer(layer).weight)
    table = cached(torch.randn(4, width, generator=torch.Generator().manual_seed(0)), 8)
    model.replace_layer(layer, CachedFeature(table, model.context))
    given = example_inputs(tiny_conditional_unet, (251, 251))
    export(model, given, tmp_path, split_int8_weights=pairs_saturate(), threads=1)
    opened = OpenVINO(1, "f32", None).open(model, tmp_path, batch=2)
    with torch.no_grad():
        expected = model(**given).sample
    assert relative(opened(**given).sample, expected) < 2e-3


def test_eight_bits_with_a_zero_point_need_another_channel(tmp_path: Path, network: nn.Module) -> None:
    model = asymmetric(network)
    given = inputs(501)
    export(model, given, tmp_path, split_int8_weights=pairs_saturate(), threads=1)
    rows = {row["layer"]: row for row in json.loads((tmp_path / "deployed.json").read_text())["layers"]}
    names = [name for name, row in rows.items() if row["note"] == "extra channel of ones"]
    assert len(names) > 0.9 * len(rows)
    seen = compare_layers(model, given, steps=(1,), layers=names, split_int8_weights=pairs_saturate(), threads=1)
    assert not [row for row in seen if row.unexplained]


def asymmetric(network: nn.Module) -> QuantizedNetwork:
    """Eight-bit affine weights, as some releases have them."""
    plan = quantizable(network, weight=8, scales="all").plan
    layers = {name: replace(line, weight=QuantSpec(8, "affine", axis=0)) for name, line in plan.layers.items()}
    return calibrated(build_quantized_network(network, replace(plan, layers=layers), MinMax()))


def test_a_layer_in_floating_point_is_an_error_that_names_it() -> None:
    integer = ExecutedKernel(("a/product0",), "Convolution", "jit_avx2_I8", ("u8", "i8", "f32"))
    behind = ExecutedKernel(("b/product0/DequantizationMultiply",), "FullyConnected", "jit_gemm_i8", ("u8", "i8"))
    unpacked = ExecutedKernel(("c/product0",), "FullyConnected", "brgemm_avx512_I8", ("f32", "i8"))
    floating = ExecutedKernel(("d/product0", "Add_1"), "Convolution", "brgconv_avx2_f32", ("f32", "f32"))
    graph = [integer, behind, unpacked, floating]
    check_integer(graph, {"a": ["a/product0"], "b": ["b/product0"]})
    with pytest.raises(
        ValueError, match=r"3 products .* c \(brgemm_avx512_I8 of f32 and i8\), d \(brgconv.*e \(not found"
    ):
        check_integer(graph, {name: [f"{name}/product0"] for name in "acde"})


def test_an_input_that_is_in_no_record_is_not_left_float(network: nn.Module) -> None:
    model = model_of(network, activation=[4, 8], scales=ScalePlan(DYNAMIC, DYNAMIC))
    with pytest.raises(ValueError, match="'conv_in' cannot be converted: bits are chosen by sampling step"):
        convert(model, inputs(501))


def test_ties_are_rare_and_found(network: nn.Module) -> None:
    model = model_of(network, scales="none")
    grid, step = activation_scale(model.layer("conv_in").input_quantizer, 4), torch.tensor([0])
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert at_tie(grid, x, step).float().mean() < 2e-3
    scale = grid.of_rows(x, step).scale
    at = at_tie(grid, scale * torch.tensor([0.5, 1.5, 0.49]).reshape(1, 3, 1, 1), step)
    assert at.flatten().tolist() == [True, True, False]


def test_bad_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="f32 or bf16, got 'f16'"):
        compile_settings(1, "f16")
    with pytest.raises(ValueError, match=r"no exported model: there is no deployed\.json"):
        ExportedUNet(tmp_path)
    (tmp_path / "deployed.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="of format 'other'"):
        ExportedUNet(tmp_path)
