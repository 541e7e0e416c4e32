"""Every file in conf/ composes, and every node with a target fits its constructor."""

import importlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.smoke.jobs import CONF, composed


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


GROUPS = ("model", "quant", "method", "sampler", "eval", "trainer", "runtime", "logger", "paths", "experiment")
SUBGROUPS = ("method/surgery", "method/scales", "method/weight_range", "method/activations", "method/weights/partition")
EVERY = [(group, choice) for group in (*GROUPS, *SUBGROUPS) for choice in choices(group)]


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


@pytest.mark.parametrize(("group", "choice"), EVERY, ids=lambda value: str(value))
def test_every_file_composes_and_fits_its_constructors(tmp_path: Path, group: str, choice: str) -> None:
    cfg = OmegaConf.to_container(composed(tmp_path, f"{group}={choice}"), resolve=True)
    found = list(targets(cfg))
    assert found
    for node in found:
        module, _, name = node["_target_"].rpartition(".")
        constructor = getattr(importlib.import_module(module), name)
        given = {key: value for key, value in node.items() if not key.startswith("_")}
        if name in ("no_mirror", "WandbMirror"):
            given |= dict.fromkeys(("folder", "name", "settings"))  # what the run itself adds
        inspect.signature(constructor).bind(**given)


def test_methods_differ_only_in_what_their_page_says(tmp_path: Path) -> None:
    def flat(method: str) -> dict[str, Any]:
        method_cfg = OmegaConf.to_container(composed(tmp_path, f"method={method}").method, resolve=True)
        items: dict[str, Any] = {}

        def walk(prefix: str, node: Any) -> None:
            if isinstance(node, dict):
                for key, value in node.items():
                    walk(f"{prefix}.{key}", value)
            else:
                items[prefix] = node

        walk("", method_cfg)
        return items

    brecq, tfmq = flat("brecq"), flat("tfmq")
    changed = {key for key in brecq.keys() | tfmq.keys() if brecq.get(key) != tfmq.get(key)}
    assert changed == {".name", ".weights.partition._target_", ".scales.scope"}


def test_the_ablation_is_four_cells_with_one_surgery(tmp_path: Path) -> None:
    experiment = OmegaConf.load(CONF / "experiment/ablation.yaml")
    axes = [[f"{key}={v}" for v in values.split(",")] for key, values in experiment.hydra.sweeper.params.items()]
    cells = [composed(tmp_path, *cell).method for cell in itertools.product(*axes)]
    assert len(cells) == 4
    assert len({(c.weights.partition._target_, c.scales.scope) for c in cells}) == 4
    assert all(cell.surgery == cells[0].surgery for cell in cells)


def test_smoke_makes_any_configuration_small(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "runtime=smoke", "method=brecq")
    assert cfg.method.weights.recipe.iterations <= 10
    assert cfg.model.protocol.images <= 32
