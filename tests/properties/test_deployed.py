"""Every method of conf/method on integer engines: what of it they multiply as integers, and whether that is the simulation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from tests.conftest import TIMESTEPS, calibrated
from tests.e2e.jobs import CONF, composed
from tests.helpers.deployed import inputs, layer_inputs, one_level_unet
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.deploy.layers import ProductLayer, deployed_layers, layer_report
from tfmq_exp.deploy.onednn import available, onednn_products, pairs_saturate
from tfmq_exp.methods.method import Method
from tfmq_exp.qat.model import clamp_parameters, finish, observe, qat_quantizers, ready, trainable
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
DOCUMENT = CONF.parent / "docs" / "deploy.md"
# One of each kind of grid that only training leaves; the others are executed in tests/unit/deploy.
EXPORTED = ("lsq_tdq", "duq", "qil_tdq", "lsq_dynamic", "dynamic_generator_time")


class Documented(NamedTuple):
    """A row of the table of methods."""

    methods: Sequence[str]
    integer: str
    why: str


def documented() -> list[Documented]:
    """The table of methods; the last row is of all that are in none of the others."""
    text = DOCUMENT.read_text().split("| method | layers in integers | reason for others |\n|---|---|---|\n")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[0].splitlines()]
    return [Documented(re.findall(r"`(\w+)`", methods), integer, why) for methods, integer, why in rows]


def row_of(method: str) -> Documented:
    *exceptions, others = documented()
    return next((row for row in exceptions if method in row.methods), others)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Every kind of layer but those that change the resolution."""
    return one_level_unet(mid_block_type=None, up_block_types=("UpBlock2D",))


@pytest.fixture(scope="module")
def parts(network: nn.Module) -> NetworkStructure:
    return read_structure(network, inputs(1))


def finished(method: Method, network: nn.Module, parts: NetworkStructure) -> QuantizedNetwork:
    """As the method leaves a network, but for what learning would have changed: trained numbers are moved at random."""
    plan = resolve(method.surgery, parts, tuple(attentions(network)), method.scales, TIMESTEPS)
    model = build_quantized_network(network, plan, method.weight_observer)
    if method.weights.trains:
        observe(model)
        with torch.no_grad():
            model(**inputs(3, 400, 900), outside="nearest")
        ready(model)
        disturb(model)
        return finish(model)
    calibrated(model)
    method.temporal(model, network, parts)
    model.tabulate_scales()
    return model


@torch.no_grad()
def disturb(model: QuantizedNetwork) -> None:
    """Away from where training begins, where gains are 1, nothing is pruned and generated steps are all the same."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model).generators:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for quantizer in qat_quantizers(model):
        for value in quantizer.extra.values():
            value.add_(0.1 * torch.rand((), generator=generator) + 0.02)
    clamp_parameters(model)


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(
    method: str, network: nn.Module, parts: NetworkStructure, tmp_path_factory: pytest.TempPathFactory
) -> QuantizedNetwork:
    """Read back from its file."""
    folder = tmp_path_factory.mktemp(method)
    choices = instantiate(composed(folder, f"method={method}", "quant=w4a8").method, _convert_="all")
    serialization.save(finished(choices, network, parts), folder / "model.safetensors")
    return serialization.load(folder / "model.safetensors")


def test_the_document_says_what_is_executed_in_integers(
    model: QuantizedNetwork, parts: NetworkStructure, method: str
) -> None:
    row = row_of(method)
    rows = layer_report(model, deployed_layers(model))
    integer = {str(line["layer"]) for line in rows if line["executed"] == "int8"}
    stem, head = ({layer.name for layer in parts.by_role(role)} for role in (Role.STEM, Role.HEAD))
    every = {str(line["layer"]) for line in rows}
    assert integer == {"every layer but the first": every - stem, "the head": head}[row.integer]
    assert {line["why"] for line in rows if line["executed"] == "float"} == ({row.why} if row.why else set())


@pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN operators for integers")
def test_every_layer_in_integers_agrees_with_its_simulation(model: QuantizedNetwork) -> None:
    """Rows at different steps."""
    given = inputs(501, 1, 501)
    seen = layer_inputs(model, given)
    layers = [layer for layer in deployed_layers(model) if layer.integer]
    assert layers
    with model.context.at(given["timestep"]), torch.no_grad():
        for layer in layers:
            expected = layer.layer(seen[layer.name])
            found = ProductLayer(layer, onednn_products(layer, pairs_saturate()), model.context)(seen[layer.name])
            assert (found - expected).abs().max() < 5e-6 * expected.abs().max(), layer.name


@pytest.mark.parametrize("method", EXPORTED, indirect=True)
def test_openvino_executes_what_training_leaves(model: QuantizedNetwork, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.openvino.export import export, pairs_saturate
    from tfmq_exp.deploy.openvino.parity import compare_layers

    given = inputs(501, 501)
    found = export(model, given, tmp_path, split_int8_weights=pairs_saturate(), threads=1)
    assert set(model.plan.layers) - set(found.products) == {"conv_in"}
    seen = compare_layers(
        model, given, steps=(1, 3), layers=list(model.plan.layers), split_int8_weights=pairs_saturate(), threads=1
    )
    assert not [row for row in seen if row.unexplained]
    assert sum(row.beyond for row in seen) < 0.01 * sum(row.outputs for row in seen)
    assert max(row.error for row in seen) < 0.03
