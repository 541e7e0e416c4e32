"""Temporal features stored by timestep and condition, as tables and as a basis, in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.sampling import output, reloaded
from tests.helpers.stored_features import conditions_of, quantized, steps_of
from tests.helpers.transformers import Stored, read_stored
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, distinct, temporal_pairs
from tfmq_exp.methods.temporal_features import BasisFeatures, CacheFeatures, FeatureInputs, StoreFeatures
from tfmq_exp.quant.timestep_context import exact_timesteps, network_timesteps
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

NAMES = ("dit", "sd35", "flux_dev", "pixart_sigma")


def with_stored(stored: Stored, how: StoreFeatures, **inputs: Any) -> QuantizedNetwork:
    model = quantized(stored)
    how(model, stored.network, stored.structure(), FeatureInputs(conditions_of(stored), **inputs))
    return model


def features(network: nn.Module, stored: Stored, steps: tuple[float | int, ...]) -> tuple[Tensor, ...]:
    t, given = temporal_pairs(network_timesteps(exact_timesteps(steps)), distinct(conditions_of(stored)))
    return TemporalInformationBlock(network, stored.structure())(t, given)


def stored_features(
    model: QuantizedNetwork, stored: Stored, steps: tuple[float | int, ...], outside: Any = "error"
) -> Any:
    t, given = temporal_pairs(network_timesteps(exact_timesteps(steps)), distinct(conditions_of(stored)))
    with model.context.at(t, outside, conditions=given):
        return TemporalInformationBlock(model.network, stored.structure())(t, given)


def relative_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    errors = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(found, exact, strict=True)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_table_holds_the_float_features_of_every_pair(name: str) -> None:
    """Each within half a step of a grid over its own row, as a loop over rows has it."""
    stored = read_stored(name)
    model = with_stored(stored, CacheFeatures(8, "always"))
    pairs = zip(
        stored_features(model, stored, steps_of(stored)),
        features(stored.network, stored, steps_of(stored)),
        strict=True,
    )
    for found, exact in pairs:
        for row, exact_row in zip(found, exact, strict=True):
            step = (exact_row.max().clamp(min=0) - exact_row.min().clamp(max=0)) / 255
            assert float((row - exact_row).abs().max()) <= 0.51 * float(step)


@pytest.mark.parametrize(
    "how", [CacheFeatures(6, "always"), BasisFeatures(8, "always", rank=3)], ids=["table", "basis"]
)
@pytest.mark.parametrize("name", ["dit", "flux_dev"])
@torch.no_grad()
def test_a_loaded_model_has_the_same_bits_and_no_weights_that_are_replaced(
    name: str, how: StoreFeatures, tmp_path: Path
) -> None:
    stored = read_stored(name)
    model = with_stored(stored, how)
    inputs = stored.calibration([0, 1], seed=0).inputs(torch.device("cpu"))
    loaded = reloaded(model, tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    temporal = stored.structure().temporal_layers
    assert loaded.replaced_weights == model.replaced_weights
    parameters = dict(stored.network.named_parameters())
    embeddings = [n for n, module in stored.network.named_modules() if isinstance(module, nn.Embedding)]
    replaced = [k for k in parameters if k.rpartition(".")[0] in {*temporal, *embeddings}]
    assert model.replaced_weights == sum(parameters[k].numel() for k in replaced)
    assert not {k for k in dict(loaded.network.named_parameters()) if k in replaced}


@torch.no_grad()
def test_a_condition_that_is_not_in_the_table_is_named() -> None:
    stored = read_stored("dit")
    model = with_stored(stored, CacheFeatures(8, "always"))
    inputs = stored.calibration([0, 1], seed=0).inputs(torch.device("cpu"))
    known = set(conditions_of(stored)["class_labels"].tolist())
    other = next(label for label in range(10) if label not in known)
    inputs["class_labels"] = torch.full_like(inputs["class_labels"], other)
    with pytest.raises(ValueError, match=f"class_labels {other}.* for which no temporal features are stored"):
        model(**inputs)
    del inputs["class_labels"]
    with pytest.raises(ValueError, match="class_labels is not given"):
        model(**inputs)


@torch.no_grad()
def test_where_nothing_is_stored_any_condition_is_served(tmp_path: Path) -> None:
    """Layers of four bits are better than a table of two; the model is stored as it is."""
    stored = read_stored("dit")
    model = with_stored(stored, CacheFeatures(2, "disturbance"))
    assert not model.stored_features
    inputs = stored.calibration([0, 1], seed=0).inputs(torch.device("cpu"))
    known = set(conditions_of(stored)["class_labels"].tolist())
    inputs["class_labels"] = torch.full_like(
        inputs["class_labels"], next(label for label in range(10) if label not in known)
    )
    assert torch.equal(output(reloaded(model, tmp_path), inputs), output(model, inputs))


def test_a_budget_keeps_the_layers_that_gain_most() -> None:
    stored = read_stored("dit")
    whole = with_stored(stored, CacheFeatures(8, "always"))
    sizes = {name: feature.size for name, feature in whole.stored_features.items()}
    fewer = with_stored(stored, CacheFeatures(8, "always", max_bytes=sum(sizes.values()) - 1))
    kept = {name: feature.size for name, feature in fewer.stored_features.items()}
    assert 0 < len(kept) < len(sizes)
    assert sum(kept.values()) < sum(sizes.values())
    assert fewer.replaced_weights < whole.replaced_weights
    with pytest.raises(ValueError, match=f"max_bytes must be at least {min(sizes.values())}"):
        with_stored(stored, CacheFeatures(8, "always", max_bytes=1))


@torch.no_grad()
def test_a_basis_serves_timesteps_between_those_of_the_finite_set() -> None:
    """Pixart's features over a denser clock: the error falls with the points, and the table reads the nearest one alone."""
    stored = read_stored("pixart_sigma")
    last, first = min(steps_of(stored)), max(steps_of(stored))
    between = tuple(range(int(last) + 3, int(first), 41))
    exact = features(stored.network, stored, between)

    def evenly(count: int) -> list[int]:
        return torch.linspace(last, first, count).round().long().tolist()

    errors = []
    for points in (None, 40, 320):
        how = BasisFeatures(8, "always", tolerance=1e-6, points=points)
        model = with_stored(stored, how, calls=evenly)
        errors.append(relative_error(stored_features(model, stored, between, "nearest"), exact))
    table = with_stored(stored, CacheFeatures(8, "always"))
    nearest = relative_error(stored_features(table, stored, between, "nearest"), exact)
    assert errors[0] < nearest
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05 * nearest


@torch.no_grad()
def test_the_rank_follows_from_the_tolerance() -> None:
    """Real vectors within it, by a full decomposition here; a given rank is kept."""
    stored = read_stored("dit")
    exact = features(stored.network, stored, steps_of(stored))
    names = [layer.name for layer in stored.structure().by_role(Role.TIME_PROJ)]
    model = with_stored(stored, BasisFeatures(8, "always", tolerance=1e-2))
    for name, feature in zip(names, exact, strict=True):
        rows = feature.double()
        centred = rows - rows.mean(0)
        values = torch.linalg.svdvals(centred).square()
        rank = next(r for r in range(len(values) + 1) if float(values[r:].sum()) <= 1e-2 * float(rows.square().sum()))
        assert model.stored_features[name].get_buffer("coefficients").shape[2] == max(1, rank)
    given = with_stored(stored, BasisFeatures(8, "always", rank=2))
    assert {f.get_buffer("coefficients").shape[2] for f in given.stored_features.values()} == {2}
    assert sum(f.size for f in given.stored_features.values()) < sum(f.size for f in model.stored_features.values())
