"""The comparison of transformers with recorded ones: everything agrees, and what is wrong fails where it is."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_check_goldens import change, script

GOLDENS = Path(__file__).parents[1] / "goldens/transformers"


def keep(content: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in [name for name in content if name not in names]:
        del content[name]


@pytest.fixture
def temporal(tmp_path: Path) -> Path:
    """Two of the architectures."""
    folder, names = Path(shutil.copytree(GOLDENS / "temporal", tmp_path / "temporal")), ("dit", "wan21")
    change(folder / "index.json", lambda index: keep(index, names))
    change(folder / "blocks.json", lambda blocks: keep(blocks["families"], names))
    return folder


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    """One of the original networks."""
    folder = Path(shutil.copytree(GOLDENS / "dit", tmp_path / "dit"))
    change(folder / "index.json", lambda index: index.pop("b"))
    return folder


def failed(part: Path) -> set[str]:
    """Groups of the only part of a folder that are not within tolerance."""
    return {group.name for group in script.check_transformers(part.parent) if not group.ok}


@pytest.mark.parametrize("part", ["temporal", "dit"])
def test_everything_agrees(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDENS / part, tmp_path / part)
    assert script.main(["transformers", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count(" ok ") > 30
    assert "FAILED" not in said


def add(name: str, amount: float = 1e-3) -> Callable[[dict[str, Any]], None]:
    """More than rounding, in one value of a tensor."""

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[-1] += amount

    return edit


def test_wrong_records_fail_where_they_are(temporal: Path) -> None:
    wan, index = temporal / "wan21.io.safetensors", temporal / "index.json"
    change(wan, add("out_of_t"))
    change(wan, add("feature.condition_embedder.time_proj"))
    change(temporal / "dit.io.safetensors", add("out_f64", 1e-10))
    change(index, lambda found: found["wan21"]["dependence"].update({"patch_embedding": ["t", "x"]}))
    change(index, lambda found: found["dit"]["only_t"].append("proj_out_1"))
    change(index, lambda found: found["dit"]["functional_layers"].append("pos_embed.proj"))

    def edit(blocks: dict[str, Any]) -> None:
        first, second = blocks["families"]["wan21"]
        blocks["families"]["wan21"] = [second, first]
        inputs = first["inputs"]
        inputs[:] = [leaf.replace("shared(1, 32", "row(1, 32") for leaf in inputs]

    change(temporal / "blocks.json", edit)
    count = len(load_file(wan)["t"])
    assert failed(temporal) == {
        f"wan21: out at {count} timesteps",
        "wan21: features",
        "dit: out_f64",
        "wan21: dependence of every layer",
        "dit: layers of the timestep alone",
        "dit: roles",
        "wan21: blocks in order",
        "wan21: rows and constants of blocks",
    }


def test_wrong_numbers_of_the_original_fail_where_they_are(dit: Path) -> None:
    io = dit / "c.io.safetensors"
    change(io, add("out_t_fractional_f64", 1e-9))
    change(io, add("tib.blocks.1.adaLN_modulation"))
    change(io, add("e2e.ddpm_10.traj", 0.1))
    change(io, add("e2e.ddim_7_eta0.5.traj_f64", 1e-6))
    change(dit / "index.json", lambda index: index["timestep_lists"].update({"7": list(range(7))}))
    change(dit / "index.json", lambda index: index["c"].update(parameters=5))
    assert failed(dit) == {
        "dit c: out_t_fractional_f64",
        "dit c: temporal features",
        "dit c: ddpm_10",
        "dit c: ddim_7_eta0.5_f64",
        "dit: timesteps of respacings",
        "dit c: parameters",
    }


def test_what_nothing_compares_fails(temporal: Path, dit: Path) -> None:
    for path in (temporal / "dit.io.safetensors", dit / "c.io.safetensors"):
        change(path, lambda tensors: tensors.update(unheard_of=torch.zeros(1)))
    assert failed(temporal) == {"temporal: tensors read", "dit: tensors read"}  # both are in one folder


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        ("dit.io.safetensors", lambda tensors: tensors.pop("out_of_t"), "'out_of_t'"),
        ("dit.model.safetensors", lambda tensors: tensors.pop("proj_out_1.bias"), r"proj_out_1\.bias"),
        ("dit.config.json", lambda config: config.update(_class_name="StableCascadeUNet"), "no known family"),
        ("index.json", lambda index: index["dit"]["varied"].append("weather"), "'weather'"),
        ("index.json", lambda index: index["dit"]["conditions"].append("cls9"), r"cond\.cls9\."),
        ("blocks.json", lambda blocks: blocks["families"].pop("dit"), "'dit'"),
    ],
)
def test_damaged_folders_are_named(
    temporal: Path, file: str, edit: Callable[[Any], Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(temporal / "index.json", lambda index: keep(index, ("dit",)))
    change(temporal / file, edit)
    assert script.main(["transformers", str(temporal.parent)]) == 2
    assert re.search(named, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        ("c.model.safetensors", lambda tensors: tensors.pop("final_layer.linear.bias"), r"proj_out_2\.bias"),
        ("index.json", lambda index: index.update(betas="cosine"), "'cosine'"),
        ("index.json", lambda index: index["c"]["runs"]["ddpm_10"].update(loop="plms"), "'plms'"),
        ("index.json", lambda index: index["c"]["constructor"].update(depth=3), "2 blocks instead of depth=3"),
    ],
)
def test_damaged_folders_of_the_original_are_named(
    dit: Path, file: str, edit: Callable[[Any], Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(dit / file, edit)
    assert script.main(["transformers", str(dit.parent)]) == 2
    assert re.search(named, capsys.readouterr().err)
