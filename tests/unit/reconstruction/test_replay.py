"""Replay of finished units' outputs."""

import pytest
import torch
from torch import nn

from tests.conftest import calibrated, quantizable
from tests.helpers.calibration import calibration
from tests.helpers.reconstruction import structure
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.replay import OutputReplay, run_unit
from tfmq_exp.reconstruction.units import Blockwise


def test_replayed_units_feed_later_ones_the_same_numbers(unet: nn.Module) -> None:
    data, model = calibration(unet, each=3), calibrated(quantizable(unet, weight=3, activation=None))
    units = Blockwise()(structure(unet), frozenset(model.weight_layers()))
    replay = OutputReplay(2**30)
    different = []
    for unit in units:
        module = unit.module(model.unet)
        run_as_usual = Capture(data, 5, SpillAllocator(2**30)).inputs(model, module)
        with replay.active(5):
            replayed = Capture(data, 5, SpillAllocator(2**30)).inputs(model, module)
        different += [] if all(map(torch.equal, replayed.tensors, run_as_usual.tensors)) else [unit.name]
        replay.add(module, run_unit(module, model.context, replayed, 5, SpillAllocator(2**30)))
    assert len(replay.outputs) == len(units)
    assert not different


def test_the_oldest_outputs_make_room_for_new_ones() -> None:
    units = [nn.Linear(1, 1) for _ in range(4)]
    replay = OutputReplay(budget=100)
    kept = []
    for unit, size in zip(units, (10, 10, 10, 26), strict=True):  # floats
        replay.add(unit, TensorTree.of(torch.zeros(size)))
        kept.append([units.index(other) for other in replay.outputs])
    assert kept == [[0], [0, 1], [1, 2], []]


def test_units_compute_again_after_a_replay() -> None:
    unit, x = nn.Linear(1, 1), torch.ones(3, 1)
    outputs = torch.arange(5.0)[:, None]
    replay, expected = OutputReplay(budget=100), unit(x)
    replay.add(unit, TensorTree.of(outputs))
    for _ in range(2):
        with replay.active(3):
            assert torch.equal(torch.cat([unit(x), unit(x[:2])]), outputs)
        assert torch.equal(unit(x), expected)
    with pytest.raises(RuntimeError, match="inside"), replay.active(3):
        raise RuntimeError("inside")
    assert torch.equal(unit(x), expected)
