"""Torch's oneDNN operators: the simulation's codes, an exact product."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.deployed import CASES, inputs, layer_inputs, model_of, one_level_unet
from tfmq_exp.deploy.layers import ProductLayer, deployed_layers
from tfmq_exp.deploy.onednn import OneDNN, available, onednn_products, pairs_saturate

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN operators for integers")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return one_level_unet()


@pytest.mark.parametrize("case", CASES)
def test_every_layer_agrees_without_exception(network: nn.Module, case: str) -> None:
    """Rows at different steps; no number is at another code, since codes are made by the same operations."""
    model = model_of(network, **CASES[case])
    if model.switches():
        model.use_bits([4, 8, 6, 4])
    given = inputs(501, 1, 501)
    seen = layer_inputs(model, given)
    with torch.no_grad(), model.context.at(given["timestep"]):
        for layer in deployed_layers(model):
            assert layer.integer
            expected = layer.layer(seen[layer.name])
            products = onednn_products(layer, pairs_saturate())
            found = ProductLayer(layer, products, model.context)(seen[layer.name])
            assert (found - expected).abs().max() < 5e-6 * expected.abs().max(), layer.name


def test_the_simulation_is_left_as_it_was(network: nn.Module) -> None:
    model = model_of(network, scales="all")
    given = inputs(501, 1)
    with torch.no_grad():
        before = model(**given).sample
        opened = OneDNN().open(model, Path(), batch=2)
        found = opened(**given).sample
        assert torch.equal(model(**given).sample, before)
    assert sum(isinstance(module, ProductLayer) for module in opened.modules()) == len(model.plan.layers)
    assert 0 < (found - before).square().mean() / before.square().mean() < 1e-3
