"""The comparison of schedulers with diffusers' and EDM's numbers, as a user runs it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_check_goldens import add, change, script

GOLDENS = Path(__file__).parents[1] / "goldens/transformers"
PARTS = ("flow", "edm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The parts that are compared here."""
    for part in PARTS:
        shutil.copytree(GOLDENS / part, tmp_path / part)
    return tmp_path


def failed(folder: Path) -> set[str]:
    return {group.name for group in script.check_transformers(folder) if not group.ok}


def test_every_number_agrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["transformers", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    for name in json.loads((folder / "edm/index.json").read_text())["trajectories"]:
        assert f"edm: {name} " in said
    for what in ("timesteps", "sigmas", "network timesteps", "trajectories, UniPCMultistepScheduler"):
        assert f"flow: {what} " in said


def edit(*place: Any) -> Callable[[dict[str, Any]], None]:
    """Set what is at a place, whose last part is the new value."""

    def apply(content: dict[str, Any]) -> None:
        *path, last, value = place
        for part in path:
            content = content[part]
        content[last] = value

    return apply


def test_wrong_numbers_fail_where_they_are_and_nowhere_else(folder: Path) -> None:
    flow, edm = folder / "flow", folder / "edm"
    change(flow / "samplers.safetensors", lambda tensors: tensors["ltx.sigmas"].mul_(1 + 1e-15))
    change(flow / "samplers.safetensors", add("sd3_shift3.traj", 3, 0, 0, 0, 0))
    change(flow / "samplers.json", edit("cases", "lumina2_shift6", "network_t", "t / 1000"))
    change(edm / "samplers.safetensors", lambda tensors: tensors["heun_7.x_of_calls"].mul_(1 + 1e-11))
    change(edm / "adm_cond.io.safetensors", add("c_noise", 2))
    assert failed(folder) == {
        "flow: sigmas",
        "flow: network timesteps",
        "flow: network timesteps of an artefact",
        "flow: trajectories, FlowMatchEulerDiscreteScheduler",
        "edm: heun_7",
        "edm: preconditioning",
    }


def test_another_folder_of_the_layout_with_other_names(folder: Path) -> None:
    """Cases are found by the index alone."""

    def rename(content: dict[str, Any]) -> None:
        for name in [name for name in content if name.startswith("flux_512x512")]:
            content[name.replace("flux_512x512", "another")] = content.pop(name)

    change(folder / "flow/samplers.json", lambda content: rename(content["cases"]))
    change(folder / "flow/samplers.safetensors", rename)
    shutil.rmtree(folder / "edm")
    assert failed(folder) == set()


def test_what_nothing_compares_fails(folder: Path) -> None:
    for part, name in (("flow", "ltx.sigmas"), ("edm", "latents")):
        change(folder / part / "samplers.safetensors", lambda t, name=name: t.update(unheard_of=t[name].clone()))
    assert failed(folder) == {"flow: tensors read", "edm: tensors of the samplers read"}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("folder", "has no folder flow, edm"),
        ("scheduler", "'os.system'"),
        ("setting", "shift must be a number above 0"),
        ("lacking tensor", "'sd3_shift3.timesteps'"),
        ("formula", "exit"),
        ("function", "'heun_sampler'"),
        ("variant", "discretization=vp"),
        ("truncated", "samplers.safetensors"),
    ],
)
def test_damaged_folders_give_one_line(
    folder: Path, damage: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, tensors, index = (
        folder / "flow/samplers.json",
        folder / "flow/samplers.safetensors",
        folder / "edm/index.json",
    )
    if damage == "folder":
        for part in PARTS:
            shutil.rmtree(folder / part)
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif damage == "lacking tensor":
        change(tensors, lambda content: content.pop("sd3_shift3.timesteps"))
    else:
        file, edited = {
            "scheduler": (cases, edit("cases", "ltx", "scheduler", "os.system")),
            "setting": (cases, edit("cases", "ltx", "config", "shift", -1.0)),
            "formula": (cases, edit("cases", "ltx", "model", "o = exit(xi), xi the input")),
            "function": (index, edit("trajectories", "heun_7", "function", "heun_sampler")),
            "variant": (index, edit("trajectories", "euler_12", "discretization", "vp")),
        }[damage]
        change(file, edited)
    assert script.main(["transformers", str(folder)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert named in said
