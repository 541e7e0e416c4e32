"""Temporal features that are stored for every sampling step."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tests.helpers.sampling import output, reloaded
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.methods.temporal_features import CacheFeatures, ComputeFeatures
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import LayerBits
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


def parts_of(network: nn.Module) -> NetworkStructure:
    return read_structure(network, example_inputs(network))


def scrambled(network: nn.Module, layers: tuple[str, ...], model: QuantizedNetwork) -> None:
    """Give some layers of a model other weights."""
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        for parameter in model.network.get_submodule(layer).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def mixed_temporal_bits(network: nn.Module) -> dict[str, LayerBits]:
    """Embedding projections that are coarse and fine in turn, after a float time embedding."""
    names = [layer.name for layer in parts_of(network).by_role(Role.TIME_PROJ)]
    fine = {name: LayerBits(8, 8) if i % 2 else LayerBits(2, 4) for i, name in enumerate(names)}
    return {"time_embedding.*": LayerBits(8, 8)} | fine


def cached_model(
    network: nn.Module, select: Literal["always", "disturbance"], bits: int, **further: Any
) -> QuantizedNetwork:
    model = calibrated(quantizable(network, **further))
    CacheFeatures(bits, select)(model, network, parts_of(network))
    return model


@pytest.mark.parametrize(
    ("select", "bits", "scales"), [("always", 8, "temporal"), ("always", 3, "none"), ("disturbance", 5, "temporal")]
)
def test_loaded_model_with_stored_features_is_bit_equal(
    network: nn.Module, tmp_path: Path, select: Literal["always", "disturbance"], bits: int, scales: str
) -> None:
    model = cached_model(network, select, bits, scales=scales, sites=mixed_temporal_bits(network))
    inputs = example_inputs(network, 2 * TIMESTEPS, seed=5)
    before = output(model, inputs)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(output(loaded, inputs), before)
    assert loaded.plan == model.plan
    assert loaded.stored_features.keys() == model.stored_features.keys()
    computed = calibrated(quantizable(network, scales=scales, sites=mixed_temporal_bits(network)))
    assert not torch.equal(before, output(computed, inputs))


def test_stored_features_are_the_float_ones_on_a_grid_for_each_step(network: nn.Module) -> None:
    model, t = cached_model(network, "always", 8), torch.tensor(TIMESTEPS)
    wanted = TemporalInformationBlock(network, parts_of(network))(t)
    with model.context.at(t):
        stored = TemporalInformationBlock(model.network, parts_of(network))(t)
    for feature, exact in zip(stored, wanted, strict=True):
        for row, exact_row in zip(feature, exact, strict=True):
            lo, hi = min(float(exact_row.min()), 0), max(float(exact_row.max()), 0)
            step = (hi - lo) / 255
            assert float((row - exact_row).abs().max()) <= 0.51 * step
            codes = row.double() / step
            torch.testing.assert_close(codes, codes.round(), atol=1e-2, rtol=0)


def test_parts_of_a_feature_with_ranges_of_their_own_are_nearer(network: nn.Module, tmp_path: Path) -> None:
    t, errors, loaded = torch.tensor(TIMESTEPS), [], nn.Module()
    wanted = torch.cat(TemporalInformationBlock(network, parts_of(network))(t), dim=1)
    for channels in (None, 16, 4):
        model = calibrated(quantizable(network))
        CacheFeatures(4, "always", channels)(model, network, parts_of(network))
        loaded = reloaded(model, tmp_path)
        with model.context.at(t), loaded.context.at(t):
            stored, again = (
                torch.cat(TemporalInformationBlock(one.network, parts_of(network))(t), dim=1) for one in (model, loaded)
            )
        assert torch.equal(stored, again)
        errors.append(float((stored - wanted).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 2


def test_nothing_of_the_temporal_information_block_is_left_when_all_is_stored(
    network: nn.Module, tmp_path: Path
) -> None:
    reloaded(calibrated(quantizable(network)), tmp_path)
    temporal = parts_of(network).temporal_layers
    whole = serialization.read(tmp_path / "model.safetensors")[1]
    assert any("time_embedding" in key for key in whole)
    model = cached_model(network, "always", 8)
    loaded = reloaded(model, tmp_path)
    stored = serialization.read(tmp_path / "model.safetensors")[1]
    kept = [key for key in stored for layer in temporal if layer in key and not key.startswith("cached/")]
    assert not kept
    assert not set(temporal).intersection(loaded.plan.layers)
    assert set(loaded.stored_features) == {layer.name for layer in parts_of(network).by_role(Role.TIME_PROJ)}
    assert {key for key in whole if not any(layer in key for layer in temporal)} == {
        key for key in stored if not key.startswith("cached/")
    }


def test_outputs_do_not_depend_on_the_temporal_layers_when_all_is_stored(network: nn.Module) -> None:
    inputs, outputs = example_inputs(network, 2 * TIMESTEPS, seed=5), []
    for change in (False, True):
        model = calibrated(quantizable(network))
        computed = output(model, inputs)
        if change:
            scrambled(network, parts_of(network).temporal_layers, model)
            assert not torch.allclose(output(model, inputs), computed, atol=1e-3)
        CacheFeatures(8, "always")(model, network, parts_of(network))
        outputs.append(output(model, inputs))
    assert torch.equal(*outputs)


def mean_error(model: QuantizedNetwork, network: nn.Module) -> float:
    rows = temporal_feature_error(model, network, parts_of(network))
    return sum(row["relative_mse"] for row in rows) / len(rows)


@pytest.mark.parametrize("select", ["always", "disturbance"])
def test_stored_features_at_8_bits_disturb_less_than_a_block_of_4(
    network: nn.Module, select: Literal["always", "disturbance"]
) -> None:
    computed = calibrated(quantizable(network, weight=4, activation=4))
    stored = cached_model(network, select, 8, weight=4, activation=4)
    assert mean_error(stored, network) < 0.1 * mean_error(computed, network)


def test_selection_stores_where_that_disturbs_less(network: nn.Module) -> None:
    plan, t, parts = mixed_temporal_bits(network), torch.tensor(TIMESTEPS), parts_of(network)
    model = calibrated(quantizable(network, sites=plan))
    block, wanted = TemporalInformationBlock(model.network, parts), TemporalInformationBlock(network, parts)(t)
    with model.context.at(t):
        own = block(t)
    expected = set()
    for name, exact, computed in zip(block.names, wanted, own, strict=True):
        errors = {"stored": 0.0, "computed": 0.0}
        for i in range(len(t)):
            lo, hi = exact[i].min().clamp(max=0), exact[i].max().clamp(min=0)
            step = (hi - lo) / (2**5 - 1)
            zero = (-lo / step).round()
            stored = step * (((exact[i] / step).round() + zero).clamp(0, 2**5 - 1) - zero)
            power = exact[i].square().mean()
            errors["stored"] += float((stored - exact[i]).square().mean() / power)
            errors["computed"] += float((computed[i] - exact[i]).square().mean() / power)
        if errors["stored"] < errors["computed"]:
            expected.add(name)
    assert 0 < len(expected) < len(block.names)
    CacheFeatures(5, "disturbance")(model, network, parts)
    assert set(model.stored_features) == expected
    with model.context.at(t):
        mixed = TemporalInformationBlock(model.network, parts)(t)
    for name, computed, now in zip(block.names, own, mixed, strict=True):
        assert torch.equal(computed, now) is (name not in expected)
    assert "time_embedding.linear_1" in model.plan.layers


def test_computing_features_changes_nothing(tiny_unet: nn.Module) -> None:
    model, inputs = calibrated(quantizable(tiny_unet)), example_inputs(tiny_unet, TIMESTEPS)
    before = output(model, inputs)
    ComputeFeatures()(model, tiny_unet, parts_of(tiny_unet))
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("bits", [1, 9])
def test_stored_features_have_2_to_8_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be a whole number from 2 to 8, got {bits}"):
        CacheFeatures(bits, "always")


def test_unknown_selection_is_named() -> None:
    with pytest.raises(ValueError, match="'never'"):
        CacheFeatures(8, "never")  # type: ignore[arg-type]
