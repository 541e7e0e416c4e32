"""Parts of a finished model made float, and put back."""

import pytest
import torch
from torch import nn

from tests.conftest import example_inputs
from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.diagnostics.partial_quantization import float_units, quantized_units
from tfmq_exp.methods.temporal_features import CacheFeatures
from tfmq_exp.surgery.config import LayerBits


def out(network: nn.Module, unet: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(**example_inputs(unet, (751, 1))).sample


def test_all_parts_float_are_the_float_network_and_come_back(subject: Subject) -> None:
    parts = quantized_units(subject.model, subject.unet, subject.structure)
    before = out(subject.model, subject.unet)
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with float_units(subject.model, subject.unet, parts):
        torch.testing.assert_close(out(subject.model, subject.unet), out(subject.unet, subject.unet))
    assert torch.equal(out(subject.model, subject.unet), before)
    assert (before - out(subject.unet, subject.unet)).abs().max() > 1e-3
    assert all(torch.equal(value, state[name]) for name, value in subject.model.state_dict().items())


def test_an_error_inside_leaves_nothing_float(subject: Subject) -> None:
    before = out(subject.model, subject.unet)
    units = quantized_units(subject.model, subject.unet, subject.structure)
    with pytest.raises(RuntimeError, match="stop"), float_units(subject.model, subject.unet, units):
        raise RuntimeError("stop")
    assert torch.equal(out(subject.model, subject.unet), before)


def test_parts_hold_every_layer_once_and_the_attentions(subject: Subject) -> None:
    parts = quantized_units(subject.model, subject.unet, subject.structure)
    assert sorted(layer for part in parts for layer in part.layers) == sorted(subject.structure.layers)
    assert sorted(name for part in parts for name in part.attentions) == sorted(subject.model.plan.operands)
    assert parts[0].layers == subject.structure.temporal_layers


def test_a_float_layer_is_no_part(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet, sites={"conv_in": LayerBits()})
    names = [part.name for part in quantized_units(subject.model, subject.unet, subject.structure)]
    assert "conv_in" not in names
    assert "conv_out" in names


def test_stored_features_make_room_for_their_layers(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet)
    CacheFeatures(8, "always")(subject.model, subject.unet, subject.structure)
    temporal, *others = quantized_units(subject.model, subject.unet, subject.structure)
    assert set(temporal.layers) == {
        *(layer.name for layer in subject.structure.by_role(Role.TIME_PROJ, Role.TIME_EMBED)),
    }
    stored = out(subject.model, subject.unet)
    with float_units(subject.model, subject.unet, [temporal, *others]):
        torch.testing.assert_close(out(subject.model, subject.unet), out(subject.unet, subject.unet))
    with float_units(subject.model, subject.unet, others):
        alone = out(subject.model, subject.unet)
    assert (
        0
        < (alone - out(subject.unet, subject.unet)).abs().max()
        < (stored - out(subject.unet, subject.unet)).abs().max()
    )
    assert torch.equal(out(subject.model, subject.unet), stored)
