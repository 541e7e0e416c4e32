"""Units quantized one at a time, against networks that are put together by hand."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.denoisers.structure import Kind
from tfmq_exp.diagnostics.partial_quantization import QuantizedUnit, quantized_units
from tfmq_exp.diagnostics.sensitivity import (
    THIRDS,
    PredictionProbe,
    prediction_errors,
    predictions,
    spread_over_steps,
)
from tfmq_exp.surgery.config import LayerBits


def probe_of(subject: Subject, samples: int = 12) -> tuple[list[QuantizedUnit], PredictionProbe]:
    units = quantized_units(subject.model, subject.unet, subject.structure)
    data = spread_over_steps(subject.data(), samples, seed=0)
    return units, PredictionProbe(subject.model, subject.unet, units, data, steps=4, batch=5)


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
    torch.testing.assert_close(probe.exact, predictions(subject.unet, probe.data, 12), atol=1e-5, rtol=1e-4)


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
