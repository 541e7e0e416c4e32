"""Ranges of activations, against tensors that hooks keep whole."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.core.seeds import Stream
from tfmq_exp.diagnostics.activation_ranges import ActivationStats, activation_name, activation_ranges, range_changes
from tfmq_exp.quant.functional import fake_quantize
from tfmq_exp.quant.spec import QParams, QuantSpec

Row = dict[str, float]


def ranges_of(subject: Subject, images: int = 3, batch: int = 2) -> list[Row]:
    made = {"images": images, "seed": 0, "batch": batch}
    return activation_ranges(subject.model, subject.denoiser, subject.structure, subject.sampling, **made)


def inputs_seen(subject: Subject, layer: str) -> list[Tensor]:
    """Inputs of a layer of the float network at every call, three trajectories at once."""
    kept: list[Tensor] = []
    handle = subject.network.get_submodule(layer).register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    predict = subject.sampling.predictor(subject.network)
    list(subject.sampling.trajectory(predict, subject.denoiser, seed=0, stream=Stream.DIAGNOSTICS, indices=range(3)))
    handle.remove()
    return kept


def test_statistics_are_those_of_the_whole_tensors(subject: Subject) -> None:
    rows = ranges_of(subject)
    names = {activation_name(name) for name in subject.model.activation_quantizers()}
    assert {row["activation"] for row in rows} == names
    assert len(rows) == 4 * len(names)
    for layer in ("mid_block.resnets.0.conv1", "time_embedding.linear_2"):
        quantizer = subject.model.layer(layer).input_quantizer
        own = [row for row in rows if row["activation"] == f"{layer}.input"]
        for row, x in zip(own, inputs_seen(subject, layer), strict=True):
            assert (row["min"], row["max"]) == pytest.approx((float(x.min()), float(x.max())), abs=1e-5)
            assert (row["mean"], row["std"]) == pytest.approx((float(x.mean()), float(x.std(correction=0))), abs=1e-5)
            low, high = x.quantile(0.01), x.quantile(0.99)
            assert (row["q01"], row["q99"]) == pytest.approx((float(low), float(high)), abs=1e-4)
            with subject.model.context.at(torch.full((len(x),), int(row["t"]))):
                on_grid, q = quantizer.quantize(x), quantizer.scale_provider(x)
            scale = float(q.scale.flatten()[0])
            assert row["interval"] == pytest.approx(scale)
            assert row["grid_max"] - row["grid_min"] == pytest.approx(255 * scale, rel=1e-5)
            assert row["clipped"] == pytest.approx(
                float(((on_grid - x).abs() > 0.501 * scale).float().mean()), abs=2e-3
            )


def test_nothing_is_left_behind(subject: Subject) -> None:
    example = subject.data(1)[slice(0, 2)].inputs(torch.device("cpu"))
    with torch.no_grad():
        before = subject.model(**example).sample
        ranges_of(subject)
        assert torch.equal(subject.model(**example).sample, before)
    assert not any(module._forward_pre_hooks for module in subject.model.modules())


def test_split_inputs_and_attention_operands_are_seen(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet, split=True, output=8)
    names = {row["activation"] for row in ranges_of(subject, images=1)}
    assert {
        "up_blocks.0.resnets.0.conv_shortcut.input.0",
        "up_blocks.0.resnets.0.conv_shortcut.input.1",
        "mid_block.attentions.0.probabilities",
        "conv_in.output",
    } <= names


def test_of_several_widths_the_one_that_acts_is_seen(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet, activation=(4, 8), attention=None)
    subject.model.use_bits([4, 8, 8, 4])
    rows = [row for row in ranges_of(subject, images=1) if row["activation"] == "conv_in.input"]
    assert [row["bits"] for row in rows] == [4, 8, 8, 4]
    assert rows[0]["grid_max"] - rows[0]["grid_min"] == pytest.approx(15 * rows[0]["interval"], rel=1e-5)


def test_a_tally_counts_what_the_grid_cannot_reach() -> None:
    spec, q = QuantSpec(2), QParams(torch.tensor([1.0]), torch.tensor([1.0]))  # the grid is -1, 0, 1, 2
    tally, drawn = ActivationStats(spec), torch.Generator().manual_seed(0)
    for x in (torch.tensor([-3.0, -1.6, -1.4, 0.0, 2.4]), torch.tensor([2.6, 9.0, 1.0])):
        tally.add(x, q, 8, drawn)
    found = tally.columns()
    assert found["clipped"] == 4 / 8
    assert (found["min"], found["max"], found["grid_min"], found["grid_max"]) == (-3, 9, -1, 2)
    whole = torch.tensor([-3.0, -1.6, -1.4, 0.0, 2.4, 2.6, 9.0, 1.0])
    assert (found["mean"], found["std"]) == pytest.approx((float(whole.mean()), float(whole.std(correction=0))))
    far = (fake_quantize(whole, q, spec) - whole).abs() > 0.5
    assert int(far.sum()) == 4


def test_a_tally_keeps_no_more_values_than_it_is_told() -> None:
    tally, drawn = ActivationStats(QuantSpec(8)), torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=drawn)
    tally.add(x, QParams(torch.tensor([0.1]), torch.tensor([128.0])), 20_000, drawn)
    assert sum(map(len, tally.drawn)) == 20_000
    assert tally.columns()["q99"] == pytest.approx(float(x[:50_000].quantile(0.99)), abs=0.08)


def test_changes_over_time() -> None:
    def row(name: str, call: int, width: float, interval: float, clipped: float) -> Row:
        ends = {"min": -width, "max": width, "q01": 0.0, "q99": width, "mean": 0.0, "std": width}
        grid = {"grid_min": -1.0, "grid_max": 1.0, "interval": interval, "clipped": clipped}
        return {"activation": name, "bits": 8, "call": call, "t": 100 - call, **ends, **grid}  # type: ignore[dict-item]

    rows = [row("still", call, 2.0, 0.5, 0.0) for call in range(3)]
    for name in ("grows", "copy"):
        rows += [row(name, call, 1.0 + call, 0.1 * (1 + call), 0.1 * (call == 1)) for call in range(3)]
    changes = {change["activation"]: change for change in range_changes(rows)}
    assert list(changes)[-1] == "still"
    assert changes["still"]["width_change"] == changes["still"]["interval_change"] == 1
    assert changes["still"]["correlation"] == 0
    grows = changes["grows"]
    assert (grows["width_change"], grows["correlation"], grows["interval_change"]) == pytest.approx((3, 1, 3))
    assert (grows["most_clipped"], grows["at_t"]) == (0.1, 99)
    assert [changes[name]["same_as"] for name in ("still", "grows", "copy")] == ["", "", "grows"]
