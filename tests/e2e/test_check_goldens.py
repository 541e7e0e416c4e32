"""The comparison of networks and samplers with those of the original programs, as a user runs it."""

import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests/goldens/compvis"
SPEC = importlib.util.spec_from_file_location("check_goldens", ROOT / "scripts/check_goldens.py")
assert SPEC is not None
assert SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)
FAMILIES = ("ddim_cifar10", "full_ddim_cifar10")


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit what a file holds: tensors by name, or JSON, packed or not."""
    if path.suffix == ".safetensors":
        content = load_file(path)
        edit(content)
        save_file(content, path)
        return
    text = path.read_bytes()
    content = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)
    edit(content)
    written = json.dumps(content).encode()
    path.write_bytes(gzip.compress(written) if path.suffix == ".gz" else written)


def keep(content: dict[str, Any], prefixes: tuple[str, ...]) -> None:
    """Drop all whose names begin otherwise."""
    for name in [name for name in content if not name.startswith(prefixes)]:
        del content[name]


def only_ddim(cases: dict[str, Any]) -> None:
    cases["cases"] = [case for case in cases["cases"] if case["id"].startswith("cifar")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The DDIM part of the goldens: a stored network, one by formula, its sampler, schedule and full-size keys."""
    found = tmp_path / "goldens"
    found.mkdir()
    for file in GOLDENS.iterdir():
        if file.name.startswith((*FAMILIES, "index", "sampler", "schedules", "fullsize")):
            shutil.copy(file, found)
    change(found / "index.json", lambda index: keep(index, FAMILIES))
    change(found / "samplers.json", only_ddim)
    change(found / "samplers.safetensors", lambda tensors: keep(tensors, ("x_T", "cifar")))
    change(found / "schedules.safetensors", lambda tensors: keep(tensors, FAMILIES))
    change(found / "fullsize_key_manifests.json.gz", lambda manifests: keep(manifests, FAMILIES))
    return found


def failed(folder: Path) -> set[str]:
    return {group.name for group in script.check_compvis(folder) if not group.ok}


@pytest.mark.slow
def test_every_network_and_sampler_agrees_with_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["compvis", str(GOLDENS)]) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    for name, settings in json.loads((GOLDENS / "index.json").read_text()).items():
        for what in ("eps", "eps_f64", "eps_x_small", *(f"e2e.{tag}" for tag in settings["e2e"] or {})):
            assert f"{name}: {what} " in said
    for name in json.loads(gzip.decompress((GOLDENS / "fullsize_key_manifests.json.gz").read_bytes())):
        assert f"full size {name}: " in said


def add(name: str, *place: int) -> Callable[[dict[str, Any]], None]:
    """More than rounding, in one value of a tensor."""

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name][place] += 2e-3

    return edit


def test_wrong_numbers_fail_where_they_are_and_nowhere_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io = folder / "ddim_cifar10.io.safetensors"
    change(io, add("eps_x_small_f64", 1, 2, 3, 4))
    change(io, add("tib.up.1.block.0.temb_proj", 0, 5))
    change(io, add("e2e.quad10_eta1.traj", 10, 0, 1, 2, 3))
    change(folder / "samplers.safetensors", add("cifar_quad10_nl.traj_f64", 4, 0, 1, 2, 3))
    change(folder / "schedules.safetensors", add("ddim_cifar10.betas", 700))
    change(
        folder / "samplers.json",
        lambda cases: cases["timestep_lists_call_order"].update({"ldm quad 50": [1] * 50}),
    )
    change(
        folder / "fullsize_key_manifests.json.gz",
        lambda manifests: manifests["ddim_cifar10"]["tensors"].update({"conv_out.weight": [3, 128, 1, 3]}),
    )
    change(folder / "full_ddim_cifar10.params.json.gz", lambda parameters: parameters.update(seed=206))
    assert failed(folder) == {
        "ddim_cifar10: eps_x_small_f64",
        "ddim_cifar10: temporal features",
        "ddim_cifar10: e2e.quad10_eta1",
        "samplers: ddim_generalized, float64",
        "schedule ddim_cifar10, ddim_cifar10",
        "timesteps of the published commands",
        "full size ddim_cifar10: keys, parameters",
        *(f"full_ddim_cifar10: {name}" for name in ("eps", "eps_f64", "eps_x_small", "eps_x_small_f64")),
    }


def test_what_nothing_compares_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "ddim_cifar10.io.safetensors", lambda tensors: tensors.update(unheard_of=tensors["t"].clone()))
    assert script.main(["compvis", str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.count("FAILED") == 1
    assert "not read: ddim_cifar10.io.safetensors: unheard_of" in said


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("folder", "index.json"),
        ("truncated", "samplers.safetensors"),
        ("lacking weight", "conv_out.weight"),
        ("lacking tensor", "'eps_f64'"),
        ("lacking noise", "fewer steps"),
        ("lacking setting", "'steps'"),
        ("another sampler", "'euler'"),
        ("no formula", "exit"),
    ],
)
def test_damaged_folders_give_one_line(
    folder: Path, damage: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    io, model = folder / "ddim_cifar10.io.safetensors", folder / "ddim_cifar10.model.safetensors"
    if damage == "folder":
        shutil.rmtree(folder)
    elif damage == "truncated":
        file = folder / "samplers.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "lacking weight":
        change(model, lambda tensors: tensors.pop("conv_out.weight"))
    elif damage == "lacking tensor":
        change(io, lambda tensors: tensors.pop("eps_f64"))
    elif damage == "lacking noise":
        change(io, lambda tensors: tensors.update({"e2e.quad10_eta1.noise": tensors["e2e.quad10_eta1.noise"][:5]}))
    elif damage == "lacking setting":
        change(folder / "index.json", lambda index: index["ddim_cifar10"]["e2e"]["quad10"].pop("steps"))
    elif damage == "another sampler":
        change(folder / "index.json", lambda index: index["ddim_cifar10"]["e2e"]["quad10"].update(sampler="euler"))
    else:
        change(folder / "samplers.json", lambda cases: cases["cases"][0].update(eps_formula="eps = exit(x)"))
    assert script.main(["compvis", str(folder)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert named in said
