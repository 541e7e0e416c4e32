"""The comparison of saved pipelines with their recorded runs, as a user's folder of them goes through it."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import GOLDENS, INDEX, NAMES, edit

SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, SCRIPTS)
    yield importlib.import_module("goldens.pipelines")
    sys.path.remove(SCRIPTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two of the pipelines."""
    names = ("dit", "wan")
    for name in names:
        shutil.copytree(GOLDENS / name, tmp_path / name)
        shutil.copy(GOLDENS / f"{name}.io.safetensors", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({name: INDEX[name] for name in names}))
    return tmp_path


def change(folder: Path, name: str, edit_tensors: Callable[[dict[str, Any]], object]) -> None:
    path = folder / f"{name}.io.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    edit_tensors(tensors)
    save_file(tensors, path)


def failed(script: ModuleType, folder: Path) -> set[str]:
    return {group.name for group in script.check_pipelines(folder) if not group.ok}


def test_every_pipeline_agrees_with_its_recorded_run(script: ModuleType) -> None:
    groups = script.check_pipelines(GOLDENS)
    assert not [group.name for group in groups if not group.ok]
    compared = {group.name for group in groups}
    whats = ("network timesteps", "scheduler", "conditions", "constants", "network", "decoded")
    assert {f"{name}: {what}" for name in NAMES for what in whats} <= compared


def test_wrong_numbers_fail_where_they_are_and_nowhere_else(script: ModuleType, folder: Path) -> None:
    def wrong(tensors: dict[str, Any]) -> None:
        tensors["call.2.timestep"] += 1
        tensors["scheduler.sigmas"][1] *= 1 + 1e-6
        tensors["call.1.encoder_hidden_states"][0, 3, 5] += 1e-3
        tensors["decoded"][0, 1, 2, 3, 1] += 1e-3

    change(folder, "wan", wrong)
    edit(folder / "index.json", lambda index: index["wan"]["constants"].update({"call.1.attention_kwargs": 1}))
    whats = ("network timesteps", "scheduler", "conditions", "constants", "decoded")
    assert failed(script, folder) == {f"wan: {what}" for what in whats}


def test_a_wrong_output_fails(script: ModuleType, folder: Path) -> None:
    change(folder, "wan", lambda tensors: tensors["call.7.output"].mul_(1.01))
    assert failed(script, folder) == {"wan: network", "wan: latents"}


def test_what_nothing_compares_fails(script: ModuleType, folder: Path) -> None:
    change(folder, "dit", lambda tensors: tensors.update(unheard_of=tensors["decoded"].clone()))
    groups = {group.name: group for group in script.check_pipelines(folder)}
    assert groups["pipelines: tensors read"].note == "not read: dit: unheard_of"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "index.json").unlink(), "index.json"),
        (lambda folder: shutil.rmtree(folder / "wan/vae"), "vae"),
        (lambda folder: change(folder, "dit", lambda tensors: tensors.pop("call.1.output")), "'call.1.output'"),
        (
            lambda folder: edit(folder / "index.json", lambda index: index["dit"]["call"].pop("class_labels")),
            "class_labels",
        ),
        (lambda folder: edit(folder / "index.json", lambda index: index["dit"].pop("network_calls")), "network_calls"),
        (lambda folder: (folder / "dit.io.safetensors").write_bytes(b"x" * 99), "dit.io.safetensors"),
    ],
)
def test_damaged_folders_are_named(script: ModuleType, folder: Path, damage: Callable[[Path], Any], named: str) -> None:
    damage(folder)
    with pytest.raises(Exception, match=named) as error:
        script.check_pipelines(folder)
    assert type(error.value).__name__ == "DamagedError"
