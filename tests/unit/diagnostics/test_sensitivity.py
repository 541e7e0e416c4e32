"""Units quantized one at a time or made float, against networks that are put together by hand."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.conftest import example_inputs
from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.denoisers.structure import Kind, Role
from tfmq_exp.diagnostics.sensitivity import (
    THIRDS,
    PredictionProbe,
    QuantizedUnit,
    float_units,
    prediction_errors,
    quantized_units,
    spread_over_steps,
)
from tfmq_exp.methods.temporal_features import CacheFeatures
from tfmq_exp.surgery.config import LayerBits


def out(network: nn.Module, unet: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(**example_inputs(unet, (751, 1))).sample


def test_all_parts_float_are_the_float_network_and_come_back(subject: Subject) -> None:
    parts = quantized_units(subject.model, subject.network, subject.structure)
    before = out(subject.model, subject.network)
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    with float_units(subject.model, subject.network, parts):
        torch.testing.assert_close(out(subject.model, subject.network), out(subject.network, subject.network))
    assert torch.equal(out(subject.model, subject.network), before)
    assert (before - out(subject.network, subject.network)).abs().max() > 1e-3
    assert all(torch.equal(value, state[name]) for name, value in subject.model.state_dict().items())


def test_an_error_inside_leaves_nothing_float(subject: Subject) -> None:
    before = out(subject.model, subject.network)
    units = quantized_units(subject.model, subject.network, subject.structure)
    with pytest.raises(RuntimeError, match="stop"), float_units(subject.model, subject.network, units):
        raise RuntimeError("stop")
    assert torch.equal(out(subject.model, subject.network), before)


def test_parts_hold_every_layer_once_and_the_attentions(subject: Subject) -> None:
    parts = quantized_units(subject.model, subject.network, subject.structure)
    assert sorted(site for part in parts for site in part.layers) == sorted(subject.structure.layers)
    assert sorted(name for part in parts for name in part.attentions) == sorted(subject.model.plan.operands)
    assert parts[0].layers == subject.structure.temporal_layers


def test_a_float_layer_is_no_part(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet, sites={"conv_in": LayerBits()})
    names = [part.name for part in quantized_units(subject.model, subject.network, subject.structure)]
    assert "conv_in" not in names
    assert "conv_out" in names


def test_stored_features_make_room_for_their_layers(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet)
    CacheFeatures(8, "always")(subject.model, subject.network, subject.structure)
    temporal, *others = quantized_units(subject.model, subject.network, subject.structure)
    assert set(temporal.layers) == {
        *(site.name for site in subject.structure.by_role(Role.TIME_PROJ, Role.TIME_EMBED)),
    }
    stored = out(subject.model, subject.network)
    with float_units(subject.model, subject.network, [temporal, *others]):
        torch.testing.assert_close(out(subject.model, subject.network), out(subject.network, subject.network))
    with float_units(subject.model, subject.network, others):
        alone = out(subject.model, subject.network)
    assert (
        0
        < (alone - out(subject.network, subject.network)).abs().max()
        < (stored - out(subject.network, subject.network)).abs().max()
    )
    assert torch.equal(out(subject.model, subject.network), stored)


def probe_of(subject: Subject, samples: int = 12) -> tuple[list[QuantizedUnit], PredictionProbe]:
    units = quantized_units(subject.model, subject.network, subject.structure)
    data = spread_over_steps(subject.data(), samples, seed=0)
    return units, PredictionProbe(subject.model, subject.network, units, data, steps=4, batch=5)


def test_a_unit_alone_is_a_float_network_with_that_unit_quantized(tiny_unet: nn.Module) -> None:
    """The last layer, quantized, on its inputs in the float network."""
    subject = subject_of(tiny_unet)
    units, probe = probe_of(subject)
    last = next(unit for unit in units if unit.name == "conv_out")
    found = probe.unit_error(last, alone=True)
    inputs: list[torch.Tensor] = []
    handle = tiny_unet.get_submodule("conv_out").register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        exact = tiny_unet(**probe.data.inputs(torch.device("cpu"))).sample
        with subject.model.context.at(probe.data.t):
            out = subject.model.layer("conv_out")(inputs[0])
    handle.remove()
    assert found["relative_error"] == pytest.approx(
        float((out - exact).square().sum() / exact.square().sum()), rel=1e-3
    )
    first = (probe.data.step * 3 // 4) == 0
    by_hand = float((out - exact)[first].square().sum() / exact[first].square().sum())
    assert found["first_third"] == pytest.approx(by_hand, rel=1e-3) != found["relative_error"]


def test_the_probe_is_the_float_network(subject: Subject) -> None:
    _, probe = probe_of(subject)
    inputs = probe.data.inputs(torch.device("cpu"))
    with torch.no_grad():
        exact = noise_of(subject.network(**inputs).sample, inputs["sample"])
    torch.testing.assert_close(probe.exact, exact, atol=1e-5, rtol=1e-4)


def test_alone_and_others_are_two_sides(subject: Subject) -> None:
    units, probe = probe_of(subject)
    whole = probe.error()["relative_error"]
    one = QuantizedUnit("all", Kind.LAYER, tuple(subject.structure.layers), tuple(subject.model.plan.operands))
    as_one = dataclasses.replace(probe, units=[one])
    everything = as_one.unit_error(one, alone=True)
    assert everything["relative_error"] == whole > 0
    assert as_one.unit_error(one, alone=False)["relative_error"] == 0
    for unit in units[:2]:
        alone = probe.unit_error(unit, alone=True)
        others = probe.unit_error(unit, alone=False)
        assert 0 < alone["relative_error"] < whole
        assert others["relative_error"] != pytest.approx(whole, rel=1e-6)
    assert probe.error()["relative_error"] == whole


def test_a_unit_with_nothing_quantized_makes_no_error(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet, sites={"conv_in": LayerBits()})
    units, probe = probe_of(subject)
    untouched = QuantizedUnit("conv_in", Kind.LAYER, ("conv_in",), ())
    probe = dataclasses.replace(probe, units=[*units, untouched])
    found = probe.unit_error(untouched, alone=True)
    assert found["relative_error"] == 0
    whole = probe.unit_error(untouched, alone=False)
    assert whole == probe.error()


@pytest.mark.parametrize(
    ("samples", "counts"), [(12, [3, 3, 3, 3]), (6, [2, 1, 2, 1]), (2, [1, 0, 1, 0]), (99, [3] * 4)]
)
def test_samples_are_spread_over_steps(subject: Subject, samples: int, counts: list[int]) -> None:
    data = subject.data()
    rows = len(data) // 4  # twice as many under guidance
    taken = spread_over_steps(data, samples, seed=0)
    found = torch.bincount(taken.step, minlength=4).tolist()
    if rows == 3 or samples < 12:
        assert found == counts
    assert sum(found) == min(samples, len(data))
    pairs = {
        (int(s), x.numpy().tobytes(), int(c)) for s, x, c in zip(taken.step, taken.x, taken.condition, strict=True)
    }
    assert len(pairs) == len(taken)


def test_thirds_of_the_steps() -> None:
    exact, found = torch.ones(6, 2), torch.ones(6, 2)
    found[0] += 1
    found[5] += 2
    errors = prediction_errors(found, exact, torch.arange(6), 6)
    assert errors["relative_error"] == pytest.approx(10 / 12)
    assert [errors[name] for name in THIRDS] == pytest.approx([0.5, 0.0, 2.0])
    assert prediction_errors(found[:2], exact[:2], torch.arange(2), 6)["last_third"] is None
