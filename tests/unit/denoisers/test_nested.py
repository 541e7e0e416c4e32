"""Arguments of networks by flat names."""

from typing import Any

import pytest
import torch

from tests.helpers.transformers import NAMES, read_stored
from tfmq_exp.denoisers.denoiser import first_argument, nested


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({}, {}),
        ({"x": 1, "y": None}, {"x": 1, "y": None}),
        ({"added.a": 1, "added.b": None, "x": 2}, {"added": {"a": 1, "b": None}, "x": 2}),
        ({"rope.0": 1, "rope.1": 2}, {"rope": (1, 2)}),
        ({"deep.a.0": 1, "deep.a.1": 2, "deep.b": 3}, {"deep": {"a": (1, 2), "b": 3}}),
        ({"rope.1": 1, "rope.2": 2}, {"rope": {"1": 1, "2": 2}}),  # no places from 0 on
    ],
)
def test_dots_stand_for_entries_and_places(flat: dict[str, Any], expected: dict[str, Any]) -> None:
    assert nested(flat) == expected


@pytest.mark.parametrize("name", NAMES)
def test_networks_take_what_comes_out(name: str) -> None:
    stored = read_stored(name)
    with torch.no_grad():
        output = stored.network(**nested(stored.arguments))[0]
    assert (output - stored.recorded["out"]).abs().max() <= 1e-5
    assert first_argument(stored.network) == "hidden_states"
