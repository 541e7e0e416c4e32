"""Units quantized one at a time, against networks that are put together by hand."""

import pytest
import torch
from torch import nn

from tests.unit.diagnostics.subject import Subject, subject_of
from tfmq_exp.denoisers.structure import Kind
from tfmq_exp.diagnostics.partial_quantization import QuantizedPart, quantized_parts
from tfmq_exp.diagnostics.sensitivity import (
    THIRDS,
    PredictionProbe,
    prediction_errors,
    predictions,
    spread_over_steps,
    unit_error,
)
from tfmq_exp.surgery.config import LayerBits


def yardstick(subject: Subject, samples: int = 12) -> tuple[list[QuantizedPart], PredictionProbe]:
    parts = quantized_parts(subject.model, subject.unet, subject.structure)
    data = spread_over_steps(subject.data(), samples, seed=0)
    return parts, PredictionProbe.of(subject.model, subject.unet, parts, data, steps=4, batch=5)


def test_a_unit_alone_is_a_float_network_with_that_unit_quantized(tiny_unet: nn.Module) -> None:
    """The last layer, whose quantized twin runs on what the float network feeds it."""
    subject = subject_of(tiny_unet)
    parts, stick = yardstick(subject)
    last = next(part for part in parts if part.name == "conv_out")
    found = unit_error(subject.model, subject.unet, last, parts, stick, alone=True)
    fed: list[torch.Tensor] = []
    handle = tiny_unet.get_submodule("conv_out").register_forward_pre_hook(lambda _m, args: fed.append(args[0]))
    with torch.no_grad():
        wanted = tiny_unet(**stick.data.inputs(torch.device("cpu"))).sample
        with subject.model.context.at(stick.data.t):
            out = subject.model.layer("conv_out")(fed[0])
    handle.remove()
    assert found["relative_error"] == pytest.approx(
        float((out - wanted).square().sum() / wanted.square().sum()), rel=1e-3
    )
    first = (stick.data.step * 3 // 4) == 0
    by_hand = float((out - wanted)[first].square().sum() / wanted[first].square().sum())
    assert found["first_third"] == pytest.approx(by_hand, rel=1e-3) != found["relative_error"]


def test_the_yardstick_is_the_float_network(subject: Subject) -> None:
    _, stick = yardstick(subject)
    torch.testing.assert_close(stick.wanted, predictions(subject.unet, stick.data, 12), atol=1e-5, rtol=1e-4)


def test_alone_and_others_are_two_sides(subject: Subject) -> None:
    parts, stick = yardstick(subject)
    whole = stick.error(subject.model)["relative_error"]
    one = QuantizedPart("all", Kind.LAYER, tuple(subject.structure.sites), tuple(subject.model.plan.operands))
    everything = unit_error(subject.model, subject.unet, one, [one], stick, alone=True)
    assert everything["relative_error"] == whole > 0
    assert unit_error(subject.model, subject.unet, one, [one], stick, alone=False)["relative_error"] == 0
    for part in parts[:2]:
        alone = unit_error(subject.model, subject.unet, part, parts, stick, alone=True)
        others = unit_error(subject.model, subject.unet, part, parts, stick, alone=False)
        assert 0 < alone["relative_error"] < whole
        assert others["relative_error"] != pytest.approx(whole, rel=1e-6)
    assert stick.error(subject.model)["relative_error"] == whole


def test_a_unit_with_nothing_quantized_makes_no_error(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet, sites={"conv_in": LayerBits()})
    parts, stick = yardstick(subject)
    untouched = QuantizedPart("conv_in", Kind.LAYER, ("conv_in",), ())
    found = unit_error(subject.model, subject.unet, untouched, [*parts, untouched], stick, alone=True)
    assert found["relative_error"] == 0
    whole = unit_error(subject.model, subject.unet, untouched, [*parts, untouched], stick, alone=False)
    assert whole == stick.error(subject.model)


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
    wanted, found = torch.ones(6, 2), torch.ones(6, 2)
    found[0] += 1
    found[5] += 2
    errors = prediction_errors(found, wanted, torch.arange(6), 6)
    assert errors["relative_error"] == pytest.approx(10 / 12)
    assert [errors[name] for name in THIRDS] == pytest.approx([0.5, 0.0, 2.0])
    assert prediction_errors(found[:2], wanted[:2], torch.arange(2), 6)["last_third"] is None
