"""Wrong input of every kind: one clear line that names it, and a store that still works afterwards."""

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from safetensors.torch import load_file, save_file

from tests.e2e.jobs import composed, job
from tfmq_exp.cli import main as app
from tfmq_exp.cli.job import attempt
from tfmq_exp.denoisers.digits import WEIGHTS
from tfmq_exp.pipeline.store import DamagedEntry, Entry, Store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    job(folder, "debug=smoke", "method=nearest")
    return folder


def failure(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Run a job that must fail; what it says on the terminal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        job(folder, "debug=smoke", "method=nearest", *overrides)
    assert stop.value.code == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    "override", ["quantt=w4a8", "quant=w5a5", "method=tfqm", "method.weights.iterz=5", "protocol.step=3"]
)
def test_unknown_keys_and_groups_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigCompositionException) as error:
        composed(tmp_path, override)
    assert override.split("=")[0].split(".")[-1] in str(error.value) or override.split("=")[1] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("quant.weight=1",), "got 1"),
        (("quant.activation=3",), "got 3"),
        (("protocol.sampling.num_inference_steps=37",), "37 sampler steps would visit timestep 1000"),
        (("until=fid",), "until must be one of"),
        (("+method.weights.iterz=5",), "iterz"),
        (("device=cuda",), "CUDA"),
        (("method/scales=dynamic", "method.scales.temporal.granularity=sometimes"), "sometimes"),
        (
            ("method/scales=timestep_groups", "method.scales.temporal.count=0"),
            "temporal.count must be a whole number, at least 1",
        ),
        (("method/scales=tdq", "method.scales.temporal.last_layer_init=sometimes"), "sometimes"),
        (("method.surgery.grids.weights=sometimes",), "grids.weights must be one of"),
        (
            ("method/timesteps=normal", "method.timesteps.samples=0"),
            "timesteps.samples must be a whole number, at least 1",
        ),
        (
            ("method/weights=jointly", "method.weights.recipe.inputs.quant_prob=2"),
            "inputs.quant_prob must be a number from 0 to 1, got 2",
        ),
        (("method/weights=reconstruct", "method.weights.recipe.rounding=null"), "this one neither"),
        (("method/temporal=cache", "method.temporal.select=sometimes"), "sometimes"),
        (("method/correction=noise", "method.correction.bias=sometimes"), "sometimes"),
        (("model.denoiser.path=/nowhere.safetensors",), "/nowhere.safetensors"),
    ],
)
def test_impossible_values_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], named: str
) -> None:
    assert named in failure(tmp_path, capsys, *overrides)


def test_a_truncated_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes((WEIGHTS / "denoiser.safetensors").read_bytes()[:100_000])
    assert "is truncated" in failure(tmp_path, capsys, f"model.denoiser.path={broken}")


def test_a_checkpoint_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = WEIGHTS / "classifier.safetensors"
    assert "another network" in failure(tmp_path, capsys, f"model.denoiser.path={other}")


@pytest.mark.parametrize("stage", ["trajectory", "weights", "activations", "images"])
def test_a_damaged_store_entry_is_named_and_can_be_made_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "store/scores")
    shutil.rmtree(tmp_path / "store/diagnostics")
    shutil.rmtree(tmp_path / "store/activations") if stage in ("trajectory", "weights") else None
    victims = sorted((tmp_path / "store" / stage).glob("*/*.safetensors"))
    entries = {victim.parent for victim in victims}
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:-7])
    message = failure(tmp_path, capsys)
    assert "damaged" in message
    assert "delete" in message
    for entry in entries:
        shutil.rmtree(entry)
    job(tmp_path, "debug=smoke", "method=nearest")


def test_a_read_only_or_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the calibration data are written: a clear line, and the next run is as if nothing was."""

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "calibration.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr("tfmq_exp.calibration.dataset.write_tensor_file", no_room)
        assert "No space left on device" in failure(tmp_path, capsys)
    assert not list(tmp_path.rglob("*.partial"))
    job(tmp_path, "debug=smoke", "method=nearest", "until=activations")
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert "Not a directory" in failure(tmp_path, capsys, f"paths.store={blocked}/store")


def _hold(entry: Entry, seconds: float) -> None:
    entry.path.mkdir(parents=True, exist_ok=True)
    with entry.locked():
        (entry.path / "held").write_text("")
        time.sleep(seconds)
        (entry.path / "result").write_text("from the other process")
        entry.finish()


def test_an_entry_that_another_process_is_writing_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    entry = store.entry("stage", {"a": 1})
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(entry, 1.0))
    other.start()
    while not (entry.path / "held").exists():
        time.sleep(0.01)
    computed = store.get_or_compute(entry, lambda folder: pytest.fail("it was computed twice"))
    other.join()
    assert not computed
    assert (entry.path / "result").read_text() == "from the other process"
    assert "another process" in caplog.text


def test_a_dead_process_does_not_keep_its_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("stage", {"a": 1})
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(entry, 60.0))
    other.start()
    while not (entry.path / "held").exists():
        time.sleep(0.01)
    other.kill()
    other.join()
    began = time.monotonic()
    assert store.get_or_compute(entry, lambda folder: (folder / "result").write_text("mine") and None)
    assert time.monotonic() - began < 10


def test_a_manifest_that_is_no_json_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("stage", {})
    store.get_or_compute(
        entry, lambda folder: save_file({"x": load_file(WEIGHTS / "classifier.safetensors")["head.bias"]}, folder / "x")
    )
    (entry.path / "manifest.json").write_text("{")
    with pytest.raises(DamagedEntry, match=r"manifest\.json"):
        store.get_or_compute(entry, lambda folder: None)


def test_a_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 1"):
        attempt(composed(tmp_path, "debug=smoke", "quant.weight=1", "runtime.traceback=true"), app.work)
