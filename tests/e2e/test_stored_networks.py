"""Networks whose weights stay in their files: every result of `run.py` has the bits of a run that has them in memory."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.jobs import job
from tests.e2e.test_pipelines import PIPELINES, overrides_of, settings_of
from tests.helpers.pipelines import copied
from tfmq_exp.denoisers.pipelines.load import load_pipeline

QUICK = (("pixart", "tfmq"), ("flux", "nearest"))
EVERY = (
    *QUICK,
    ("sd3", "tfmq"),
    ("flux", "brecq"),
    ("sd3", "gptq"),
    ("sd3", "qdiff"),
    ("pixart", "tfmq_cache"),
    ("pixart", "ptqd"),
)


def results(folder: Path) -> dict[str, str]:
    """Hashes of the stored tensors, but for those of single units."""
    files = [file for file in (folder / "store").rglob("*.safetensors") if file.parent.name != "units"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ran(name: str, method: str, weights: str, folder: Path, *further: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    given = (
        "protocol.sampling.images=2",
        "until=images",
        f"paths.store={folder / 'store'}",
        f"method={method}",
        *further,
    )
    job(
        folder,
        "model=pipeline",
        *overrides_of(name, folder.parent),
        "protocol.scales.iterations=10",
        "protocol.correction.images=4",
        f"runtime.weights={weights}",
        "runtime.estimate=false",
        *given,
    )
    return results(folder)


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.every_family) for pair in EVERY],
)
def test_results_are_those_of_a_network_in_memory(name: str, method: str, tmp_path: Path) -> None:
    stored = ran(name, method, "stored", tmp_path / "stored")
    assert {file.split("/")[1] for file in stored} >= {"weights", "activations", "images"}
    assert stored == ran(name, method, "memory", tmp_path / "memory")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=qdrop"], "these stages need the network in memory: weights"),
        (["until=diagnose"], "these stages need the network in memory: rounding"),
        (["runtime.processes=2"], "runtime.weights=stored needs runtime.processes=1, got 2"),
        (["runtime.weights=disk"], "runtime.weights must be one of memory, stored, got 'disk'"),
    ],
)
def test_what_needs_the_network_in_memory_says_so(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "model=pipeline", *overrides_of("pixart", tmp_path), "runtime.weights=stored", "until=images"
    with pytest.raises(SystemExit):
        job(tmp_path, *given, f"paths.store={tmp_path / 'store'}", *overrides)
    assert message in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "store").exists()


@pytest.mark.bad_input
def test_models_whose_files_are_read_whole_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, "model=digits", "runtime.weights=stored")
    assert "needs model=pipeline, whose files are read in parts, got digits" in " ".join(
        "".join(capsys.readouterr()).split()
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), "1 weights are missing, first proj_out.bias"),
        (lambda state: state.update(other=torch.ones(1)), "1 weights are not in the architecture, first other"),
        (lambda state: state["proj_out.bias"].fill_(torch.nan), "proj_out.bias is not finite: 32 NaN"),
        (
            lambda state: state.update({"proj_out.bias": torch.ones(3)}),
            r"proj_out.bias is \(3,\) of torch.float32 instead",
        ),
        (lambda state: state.update({"proj_out.bias": torch.ones(32).char()}), "of torch.int8 instead"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_runs(change: Any, message: str, tmp_path: Path) -> None:
    folder = copied("pixart", tmp_path)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder, settings=settings_of("pixart"), weights="stored")


@pytest.mark.bad_input
def test_checkpoints_in_one_file_are_refused(tmp_path: Path) -> None:
    file = PIPELINES / "pixart/transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="weights in one file are read whole"):
        load_pipeline(PIPELINES / "pixart", checkpoint=file, weights="stored")
