"""Temporal features layer by layer, against hooks on the layers and the mean that runs report."""

from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, example_inputs
from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.diagnostics.temporal_error import EMBEDDING, feature_errors, features_by_layer, temporal_feature_error
from tfmq_exp.methods.temporal_features import CacheFeatures


def seen(network: nn.Module, layers: nn.Module, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """What a layer returns inside a forward pass of the whole network."""
    kept: list[Tensor] = []
    handle = layers.get_submodule(name).register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        network(**inputs)
    handle.remove()
    return kept[0]


def test_rows_are_what_layers_return_inside_the_network(subject: Subject) -> None:
    rows = feature_errors(subject.model, subject.network, subject.structure)
    projections = [layer.name for layer in subject.structure.by_role(Role.TIME_PROJ)]
    assert sorted({row["layer"] for row in rows}) == sorted([EMBEDDING, *projections])
    assert len(rows) == len(TIMESTEPS) * (1 + len(projections))
    inputs, name = example_inputs(subject.network, TIMESTEPS), projections[-1]
    found = seen(subject.model, subject.model.network, name, inputs)
    expected = seen(subject.network, subject.network, name, inputs)
    for row in (row for row in rows if row["layer"] == name):
        a, b = found[row["step"]].double(), expected[row["step"]].double()
        assert row["t"] == TIMESTEPS[row["step"]]
        assert row["cosine_distance"] == pytest.approx(float(1 - a @ b / (a.norm() * b.norm())), rel=1e-4)
        assert row["relative_mse"] == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-4)


def test_the_mean_over_projections_is_the_error_that_runs_report(subject: Subject) -> None:
    rows = feature_errors(subject.model, subject.network, subject.structure)
    for reported in temporal_feature_error(subject.model, subject.network, subject.structure):
        here = [row for row in rows if row["step"] == reported["step"] and row["layer"] != EMBEDDING]
        assert fmean(row["relative_mse"] for row in here) == pytest.approx(reported["relative_mse"], rel=1e-4)
        assert fmean(row["mse"] for row in here) == pytest.approx(reported["mse"], rel=1e-4)
        cosine = 1 - fmean(row["cosine_distance"] for row in here)
        assert cosine == pytest.approx(reported["cosine"], abs=1e-5)


def test_layers_are_means_over_timesteps(subject: Subject) -> None:
    rows = feature_errors(subject.model, subject.network, subject.structure)
    for layer in features_by_layer(rows):
        group = [row for row in rows if row["layer"] == layer["layer"]]
        assert layer["relative_mse"] == pytest.approx(sum(row["relative_mse"] for row in group) / 4)
        assert {row["relative_mse"] for row in group if row["t"] == layer["at_t"]} == {
            max(row["relative_mse"] for row in group)
        }


def test_where_every_feature_is_stored_there_is_no_embedding(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet)
    CacheFeatures(8, "always")(subject.model, subject.network, subject.structure)
    rows = feature_errors(subject.model, subject.network, subject.structure)
    assert EMBEDDING not in {row["layer"] for row in rows}
    assert 0 < max(row["relative_mse"] for row in rows) < 1e-4
