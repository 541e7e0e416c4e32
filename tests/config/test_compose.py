"""Every file in conf/ composes, and every node with a target fits its constructor."""

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from tests.e2e.jobs import CONF, composed

FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
CHOICES = [file for file in FILES if len(file.parts) > 1 and file.parts[0] != "hydra"]


def overrides(file: Path) -> list[str]:
    """What a user types to choose a file. A part of a method is put into one that has every kind of part."""
    depth = 1 if file.parts[0] == "experiment" else len(file.parts) - 1
    choice = f"{'/'.join(file.parts[:depth])}={'/'.join(file.parts[depth:])}"
    if file.parts[0] != "method" or depth == 1:
        return [choice]
    wholes = {"observer": "tfmq", "qat": "lsq", "encoding": "tdq"}
    return [f"method={next((wholes[part] for part in file.parts if part in wholes), 'qdrop')}", choice]


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize("file", CHOICES, ids=str)
def test_every_file_composes_and_fits_its_constructors(tmp_path: Path, file: Path) -> None:
    cfg = OmegaConf.to_container(composed(tmp_path, *overrides(file)), resolve=True)
    found = list(targets(cfg))
    assert found
    for node in found:
        constructor = get_object(node["_target_"])
        given = {key: value for key, value in node.items() if not key.startswith("_")}
        inspect.signature(constructor).bind(**given)


def flat(folder: Path, *overrides: str) -> dict[str, Any]:
    """Every setting of a method, by its path."""
    items: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else key, value)
        else:
            items[prefix] = node

    walk("", OmegaConf.to_container(composed(folder, *overrides).method, resolve=True))
    return items


def difference(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key, ...) != other.get(key, ...)}


AXES = {
    "nearest": set(),
    "dynamic": {"scales", "weights"},
    "ptq4dm": {"surgery", "scales", "weight_observer", "timesteps", "activations"},
    "brecq": {"surgery", "weights", "activations"},
    "freeze": {"surgery", "weights", "activations"},
    "qdrop": {"surgery", "weights", "activations"},
    "qdiff": {"surgery", "weights", "activations"},
    "ptqd": {"weights", "activations", "correction"},
    "tdq": {"scales", "weights", "activations"},
    "tdq_thin": {"scales", "weights", "activations"},
    "intervals": {"scales", "weights", "activations"},
    "tfmq": {"scales", "weights"},
    "tfmq_cache": {"scales", "weights", "temporal"},
    "tfmq_basis": {"scales", "weights", "temporal"},
    "tfmq_qdrop": {"scales", "weights", "activations"},
    "gptq": {"weights"},
    "tfmq_gptq": {"scales", "weights"},
    "gptq_reconstruct": {"scales", "weights"},
    "lsq": {"surgery", "weight_observer", "weights", "activations"},
    "pact": {"surgery", "weight_observer", "weights", "activations"},
    "nipq": {"surgery", "weight_observer", "weights", "activations"},
    "qil": {"surgery", "weight_observer", "weights", "activations"},
    "duq": {"surgery", "weight_observer", "weights", "activations"},
    "lsq_tdq": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "pact_tdq": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "nipq_tdq": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "qil_tdq": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "duq_tdq": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "lsq_dynamic": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "dynamic_generator": {"surgery", "weight_observer", "weights", "activations", "scales"},
    "dynamic_generator_time": {"surgery", "weight_observer", "weights", "activations", "scales"},
}


def test_methods_differ_only_in_what_their_page_says(tmp_path: Path) -> None:
    assert AXES.keys() == {file.name for file in CHOICES if file.parent == Path("method")}
    nearest = flat(tmp_path, "method=nearest")
    for method, axes in AXES.items():
        changed = {key.split(".")[0] for key in difference(flat(tmp_path, f"method={method}"), nearest)}
        assert changed - {"name"} == axes, method


@pytest.mark.parametrize(
    ("one", "other", "changed"),
    [
        (
            ("method=tfmq",),
            ("method=tfmq", "method/weights/partition=blockwise", "method/scales=static"),
            {
                "weights.partition._target_",
                "scales.temporal._target_",
                *(
                    f"scales.temporal.observer.{key}" for key in ("_target_", "include_zero")
                ),  # static has the same by default
            },
        ),
        (
            ("method=freeze",),
            ("method=brecq",),
            {"name", "weights.partition._target_", "activations.partition._target_"},
        ),
        (
            ("method=tfmq_cache",),
            ("method=tfmq",),
            {
                "name",
                "temporal._target_",
                "temporal.bits",
                "temporal.select",
                "temporal.channels",
                "temporal.max_bytes",
            },
        ),
        (
            ("method=tfmq_qdrop",),
            ("method=qdrop", "method/surgery=default", "method/scales=finite_set"),
            {"name", "weights.partition._target_"},
        ),
        (
            ("method=ptqd", "method/correction=none"),
            ("method=brecq", "method/surgery=default"),
            {"name"},
        ),
        (
            ("method=qdiff",),
            ("method=ptqd", "method/correction=none"),
            {
                "name",
                "surgery.attention.operands",
                "surgery.attention.probabilities",
                "surgery.split_shortcuts",
            },
        ),
        (
            ("method=tdq", "method/scales=static"),
            ("method=ptqd", "method/correction=none"),
            {"name"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_methods_that_share_most_differ_in_a_few_settings(
    tmp_path: Path, one: tuple[str, ...], other: tuple[str, ...], changed: set[str]
) -> None:
    assert difference(flat(tmp_path, *one), flat(tmp_path, *other)) == changed


def test_the_ablation_is_four_cells_with_one_surgery(tmp_path: Path) -> None:
    experiment = OmegaConf.load(CONF / "experiment/ablation.yaml")
    axes = [[f"{key}={v}" for v in values.split(",")] for key, values in experiment.hydra.sweeper.params.items()]
    cells = [composed(tmp_path, *cell).method for cell in itertools.product(*axes)]
    assert len(cells) == 4
    assert len({(c.weights.partition._target_, c.scales.temporal._target_) for c in cells}) == 4
    assert all(cell.surgery == cells[0].surgery for cell in cells)


def test_smoke_makes_any_configuration_small(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "debug=smoke", "method=brecq")
    assert cfg.method.weights.recipe.iterations <= 10
    assert cfg.method.activations.recipe.iterations <= 10
    assert cfg.protocol.sampling.images <= 32
