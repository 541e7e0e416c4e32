"""Torch's oneDNN operators: the simulation's codes, an exact product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.deploy.subject import CASES, inputs, model_of, one_level_unet
from tfmq_exp.deploy.onednn_engine import IntegerLayer, OneDNN, available, saturating
from tfmq_exp.deploy.sites import examine

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN operators for integers")


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return one_level_unet()


@pytest.mark.parametrize("case", CASES)
def test_every_layer_agrees_without_exception(unet: nn.Module, case: str) -> None:
    """Rows at different steps; no number is at another code, since codes are made by the same operations."""
    model = model_of(unet, **CASES[case])
    if model.switches():
        model.use_bits([4, 8, 6, 4])
    seen: dict[str, torch.Tensor] = {}

    def keep(site: str) -> Any:
        return lambda _, args: seen.update({site: args[0]})

    handles = [model.layer(site).register_forward_pre_hook(keep(site)) for site in model.plan.sites]
    given = inputs(501, 1, 501)
    with torch.no_grad():
        model(**given)
        for handle in handles:
            handle.remove()
        with model.context.at(given["timestep"]):
            for site in examine(model):
                assert site.integer
                wanted = site.layer(seen[site.name])
                found = IntegerLayer(site, model.context, saturating())(seen[site.name])
                assert (found - wanted).abs().max() < 5e-6 * wanted.abs().max(), site.name


def test_the_simulation_is_left_as_it_was(unet: nn.Module) -> None:
    model = model_of(unet, scales="all")
    given = inputs(501, 1)
    with torch.no_grad():
        before = model(**given).sample
        opened = OneDNN().open(model, Path(), batch=2)
        found = opened(**given).sample
        assert torch.equal(model(**given).sample, before)
    assert sum(isinstance(module, IntegerLayer) for module in opened.modules()) == len(model.plan.sites)
    assert 0 < (found - before).square().mean() / before.square().mean() < 1e-3
