"""The library example of the README runs, and gives the numbers of `run.py` with the same settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tfmq_exp
from tests.e2e.jobs import job
from tests.unit.sampling.folders import put_scheduler, save_unconditional
from tfmq_exp.api import configuration
from tfmq_exp.sampling.diffusers_scheduler import Scheduler
from tfmq_exp.surgery.config import QuantizationConfig

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def test_the_readme_example_has_the_numbers_of_run_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "quantize(" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    given = re.findall(r'"(protocol[^"]+)"', code)
    run = job(
        tmp_path / "job", "method=tfmq", "quant=w4a8", "protocol.calibration.images=4", *given, "until=activations"
    )
    stages = json.loads((run / "artifacts.json").read_text())
    artefact = Path(stages["activations"]["path"]) / "quantized.safetensors"
    assert (tmp_path / "digits-w4a8.safetensors").read_bytes() == artefact.read_bytes()


def test_a_store_keeps_the_stages_and_a_configuration_replaces_the_method_s(tmp_path: Path) -> None:
    denoiser = tfmq_exp.load_denoiser("digits")
    chosen = configuration("method=nearest").method.surgery
    roles = {role: {**bits} for role, bits in chosen.roles.items()} | {"head": None}
    config = QuantizationConfig(roles, split_shortcuts=False)  # type: ignore[arg-type]
    settings = {"method": "nearest", "overrides": ("debug=smoke",), "progress": False, "store": tmp_path / "store"}
    model = tfmq_exp.quantize(denoiser, 2, config=config, **settings)  # type: ignore[arg-type]
    assert "conv_out" not in model.network.integers
    assert "conv_in" in model.network.integers
    assert len(list((tmp_path / "store").glob("activations/*/quantized.safetensors"))) == 1


def test_a_folder_of_diffusers_is_sampled_by_its_own_scheduler(tmp_path: Path) -> None:
    save_unconditional(tmp_path)
    put_scheduler(tmp_path, "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False})
    folder = f"path={tmp_path}"
    denoiser = tfmq_exp.load_denoiser("diffusers", folder)
    quick = (folder, "debug=smoke", "device=cpu")
    model = tfmq_exp.quantize(denoiser, 2, "nearest", "w8a8", overrides=quick, device="cuda", progress=False)
    assert model.recipe is not None
    assert isinstance(model.recipe.sampling.sampler, Scheduler)
    assert model.recipe.sampling.sampler.settings["timestep_spacing"] == "trailing"
    assert tfmq_exp.sample(model, indices=[5, 0]).shape == (2, *denoiser.sample_shape)


def test_a_table_of_two_steps_serves_five_where_that_is_allowed(tmp_path: Path) -> None:
    quick = ("debug=smoke", "protocol.sampling.num_inference_steps=2")
    denoiser = tfmq_exp.load_denoiser("digits", *quick)
    model = tfmq_exp.quantize(denoiser, 2, "tfmq_cache", overrides=quick, progress=False)
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"timestep \d+ is outside .* 2 timesteps .*outside_timesteps=nearest"):
        tfmq_exp.sample(model, range(2), num_inference_steps=5)
    near = tfmq_exp.load_quantized(tmp_path / "model.safetensors", outside_timesteps="nearest")
    assert near.network.plan.outside_timesteps == "nearest"
    assert (tfmq_exp.sample(near, range(2)) == tfmq_exp.sample(model, range(2))).all()
    assert tfmq_exp.sample(near, range(2), num_inference_steps=5).isfinite().all()
    near.save(tmp_path / "near.safetensors")
    assert tfmq_exp.load_quantized(tmp_path / "near.safetensors").network.plan.outside_timesteps == "nearest"
    with pytest.raises(ValueError, match="outside_timesteps must be one of error, nearest, got 'closest'"):
        tfmq_exp.load_quantized(tmp_path / "near.safetensors", outside_timesteps="closest")  # type: ignore[arg-type]


def test_a_run_calibrates_with_fewer_steps_than_it_samples(tmp_path: Path) -> None:
    settings = ["debug=smoke", "method=nearest", "quant=w8a8", "protocol.sampling.num_inference_steps=4"]
    fewer = "protocol.calibration.num_inference_steps=2"
    nearest = "method.surgery.outside_timesteps=nearest"
    run = job(tmp_path, *settings, fewer, nearest, "protocol.sampling.images=8")
    _, record = json.loads((run / "results.json").read_text())["rows"]
    assert record["protocol"]["calibration_calls"] == 2
    assert record["protocol"]["network_calls"] == 4
    assert record["quantized"]["outside_timesteps"] == "nearest"
    sampled = [line.split(",")[1] for line in (run / "temporal_error.csv").read_text().splitlines()[1:]]
    assert sampled == ["751", "501", "251", "1"]  # not the two that were calibrated


def test_what_a_file_cannot_hold_is_refused() -> None:
    denoiser = tfmq_exp.load_denoiser("digits")
    with pytest.raises(ValueError, match=r"method ptqd corrects its samples .*method/correction=none"):
        tfmq_exp.quantize(denoiser, 2, "ptqd", overrides=("debug=smoke",), progress=False)
    fewer = ("debug=smoke", "protocol.calibration.num_inference_steps=2", "method.surgery.outside_timesteps=nearest")
    with pytest.raises(ValueError, match="num_inference_steps=2 needs method/correction=none"):
        tfmq_exp.quantize(denoiser, 2, "ptqd", overrides=fewer, progress=False)
    for steps, reason in (
        (3, "3 sampler steps would visit timestep 1000"),
        (10**5, "100000 sampler steps are not 1 to 1000"),
    ):
        wrong = (fewer[0], f"protocol.calibration.num_inference_steps={steps}", fewer[2])
        with pytest.raises(ValueError, match=f"protocol.calibration.num_inference_steps={steps}: {reason}"):
            tfmq_exp.quantize(denoiser, 2, "nearest", overrides=wrong, progress=False)


def test_a_folder_must_be_named() -> None:
    with pytest.raises(ValueError, match="path has no value"):
        tfmq_exp.load_denoiser("diffusers")


def test_values_are_looked_at_as_those_of_a_run() -> None:
    with pytest.raises(ValueError, match=r"runtime\.batch_size must be a whole number"):
        tfmq_exp.quantize(tfmq_exp.load_denoiser("digits"), overrides=["runtime.batch_size=0"])


@pytest.mark.parametrize("wrong", [{"method": "tfqm"}, {"bits": "w5a5"}, {"device": "tpu"}])
def test_settings_that_cannot_be_are_errors(wrong: dict[str, str]) -> None:
    with pytest.raises(Exception, match=next(iter(wrong.values()))):
        tfmq_exp.quantize(tfmq_exp.load_denoiser("digits"), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["digits", None, "the network alone"])
def test_what_is_no_denoiser(wrong: Any) -> None:
    given: Any = tfmq_exp.load_denoiser("digits").network if wrong == "the network alone" else wrong
    with pytest.raises(ValueError, match="denoiser must be what load_denoiser returns, got"):
        tfmq_exp.quantize(given, 2)


def test_overrides_are_several_texts() -> None:
    with pytest.raises(ValueError, match=r"overrides must be a list of texts, such as \['debug=smoke'\], got one text"):
        tfmq_exp.quantize(tfmq_exp.load_denoiser("digits"), 2, overrides="debug=smoke")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    quick = {"overrides": ("debug=smoke",), "progress": False}
    model = tfmq_exp.quantize(tfmq_exp.load_denoiser("digits"), 2, "nearest", **quick)  # type: ignore[arg-type]
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    for place, error in {
        "nowhere/a.safetensors": FileNotFoundError,
        "file/a.safetensors": FileNotFoundError,
        "folder.safetensors": IsADirectoryError,
    }.items():
        with pytest.raises(error, match=re.escape(str(Path(place).parts[0]))):
            model.save(tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} == {"folder.safetensors", "file"}
    size = model.save(str(tmp_path / "a.safetensors"))
    assert size == (tmp_path / "a.safetensors").stat().st_size
