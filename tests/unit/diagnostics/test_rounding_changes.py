"""Weights away from the nearest integer, counted by hand."""

import pytest
import torch
from torch import nn

from tests.conftest import quantizable
from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.diagnostics.rounding_changes import rounding_changes


def test_nearest_rounding_changes_nothing(subject: Subject) -> None:
    rows = rounding_changes(subject.model, subject.network, subject.structure)
    order = [layer for block in subject.structure.blocks for layer in block.layers]
    assert [row["layer"] for row in rows] == order
    assert {(row["changed"], row["up"], row["largest_steps"], row["mse_ratio"]) for row in rows} == {(0, 0, 0, 1)}


def test_moved_integers_are_counted(tiny_unet: nn.Module) -> None:
    subject = subject_of(tiny_unet)
    name = "mid_block.resnets.0.conv1"
    (integers,) = subject.model.integers[name]
    codes = integers.codes.clone().flatten()
    up, down = (torch.nonzero(codes == 7).flatten()[:12], torch.nonzero(codes == 9).flatten()[:5])
    codes[up] += 1
    codes[down] -= 2
    moved = integers._replace(codes=codes.reshape(integers.codes.shape))
    subject.model.freeze(name, (moved,))
    rows = {row["layer"]: row for row in rounding_changes(subject.model, tiny_unet, subject.structure)}
    row, weight = rows[name], tiny_unet.get_submodule(name).weight
    assert row["changed"] * weight.numel() == pytest.approx(17)
    assert row["up"] * weight.numel() == pytest.approx(12)
    assert row["largest_steps"] == 2
    error, nearest = ((part.dequantize() - weight).square().sum() for part in (moved, integers))
    assert row["mse_ratio"] == pytest.approx(float(error / nearest), rel=1e-5)
    assert row["relative_mse"] == pytest.approx(float(error / weight.square().sum()), rel=1e-5)
    assert sum(row["changed"] > 0 for row in rows.values()) == 1


def test_learned_rounding_is_one_step_away_where_it_was_told_to_turn(tiny_unet: nn.Module) -> None:
    model = quantizable(tiny_unet, weight=4, activation=None, split=True)
    model.calibrate_weights()
    shortcut = "up_blocks.0.resnets.0.conv_shortcut"
    turned = 0
    for rounding in model.learn_rounding(shortcut):
        with torch.no_grad():
            rounding.v.view(-1)[:50] *= -1  # the other neighbour
        rounding.harden()
        outside = (rounding.gap == 0).flatten()[:50]  # neighbours that are one point of the grid
        turned += 50 - int(outside.sum())
    for layer in model.weight_layers():
        model.freeze(layer)
    assert len(model.integers[shortcut]) == 2
    example = {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.tensor([1])}
    rows = {row["layer"]: row for row in rounding_changes(model, tiny_unet, read_structure(tiny_unet, example))}
    assert rows[shortcut]["changed"] * rows[shortcut]["weights"] == pytest.approx(turned)
    assert rows[shortcut]["largest_steps"] == 1
    assert rows[shortcut]["mse_ratio"] > 1
