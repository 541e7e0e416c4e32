"""Runs whose first stage and text encoders are quantized, too: what is computed, recorded, and sampled from the artefacts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.jobs import job
from tests.e2e.test_models import GOLDENS as ORIGINALS
from tests.e2e.test_models import checkpoint, real_images, shared
from tests.helpers.pipelines import GOLDENS
from tfmq_exp import api
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import table
from tfmq_exp.sampling.images import to_uint8

__all__ = ["shared"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

CALL = {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 4.0, "negative_prompt": "dog"}
TEXTS = ["a red cat", "photo of the sea", "the red sea", "a cat"]
QUICK = (
    *("protocol.sampling.num_inference_steps=4", "protocol.calibration.images=8", "protocol.sampling.images=4"),
    *("protocol.reconstruction.iterations=10", "protocol.reconstruction.batch_size=4", "runtime.batch_size=4"),
)


def pipeline_run(folder: Path, *overrides: str) -> Path:
    texts = folder / "captions.txt"
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    call = [f"+model.call.{key}={json.dumps(value)}" for key, value in CALL.items()]
    where = (f"path={GOLDENS / 'sd3'}", f"captions={texts}", f"paths.store={folder / 'store'}", "until=images")
    return job(folder / "outputs", "model=pipeline", *where, *call, *QUICK, *overrides)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_pipeline_is_sampled_with_its_artefacts(tmp_path: Path) -> None:
    plain = read(pipeline_run(tmp_path) / "artifacts.json")
    run = pipeline_run(tmp_path, "first_stage=w4a8", "text_encoder=w4a8")
    stages, found = read(run / "artifacts.json"), read(run / "components.json")
    # the denoiser and the float images are those of the other run, under their keys of before
    for name in ("float images", "activations"):
        assert (stages[name]["key"], stages[name]["computed"]) == (plain[name]["key"], False)
    assert stages["images"]["key"] != plain["images"]["key"]
    assert found["first_stage"]["bits"] == "w4a8"
    assert 15 < found["first_stage"]["psnr"] < 60
    assert found["text_encoders"].keys() == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    for row in found["text_encoders"].values():
        assert 0 < row["relative_error"] < 0.5
        assert row["cosine"] > 0.9

    call = [f"+model.call.{key}={json.dumps(value)}" for key, value in CALL.items()]
    denoiser = api.load_denoiser("pipeline", f"path={GOLDENS / 'sd3'}", *call)
    encoders = Path(stages["text_encoders"]["path"])
    files = {name: encoders / f"{name}.safetensors" for name in found["text_encoders"]}
    quantized = api.with_components(denoiser, Path(stages["first_stage"]["path"]) / "decoder.safetensors", files)
    model = api.load_quantized(Path(stages["activations"]["path"]) / "quantized.safetensors")
    exact, ours = (one.encoder(TEXTS) for one in (denoiser, quantized))
    for name, value in exact.given.items():
        assert not torch.equal(value, ours.given[name])
    assert not torch.equal(exact.null["encoder_hidden_states"], ours.null["encoder_hidden_states"])
    images = to_uint8(quantized.first_stage.decode(api.sample(model, range(4), conditions=ours)), "round")
    stored = load_file(Path(stages["images"]["path"]) / "images-000000.safetensors")["images"]
    assert torch.equal(images, stored)
    assert not torch.equal(
        images, to_uint8(denoiser.first_stage.decode(api.sample(model, range(4), conditions=ours)), "round")
    )


def original_run(model: str, recorded: str, side: int, folder: Path, *overrides: str) -> Path:
    return job(
        folder,
        *(f"model={model}", "debug=smoke", "protocol.sampling.images=10", "protocol.calibration.images=8"),
        f"model.denoiser.path={checkpoint(recorded, folder)}",
        f"model.denoiser.config={ORIGINALS / recorded}.config.yaml",
        *("data=image_folder", f"data.path={real_images(folder / 'real', side)}", f"data.size={side}"),
        *("method=nearest", "first_stage=w8a8", *overrides),
    )


def test_a_decoder_behind_a_codebook(tmp_path: Path) -> None:
    folder = original_run("ldm_bedroom", "ldm_lsun_beds", 64, tmp_path, "until=images")
    assert read(folder / "components.json")["first_stage"]["psnr"] > 20


@pytest.mark.slow
def test_records_of_an_original_checkpoint(tmp_path: Path, shared: Path) -> None:
    texts = f"model.sampling.conditioning.path={shared / 'captions.txt'}"
    files = (f"model.denoiser.tokenizer={shared / 'tokenizer'}", texts, f"paths.inception={shared / 'inception.pth'}")
    folder = original_run("sd_v1_4", "sd_v1", 128, tmp_path, "text_encoder=w8a8", *files)
    exact, ours = read(folder / "results.json")["rows"]
    assert "first_stage" not in exact["quantized"]
    assert (ours["choices"]["first_stage"], ours["choices"]["text_encoder"]) == ("w8a8", "w8a8")
    assert ours["errors"]["decoder_psnr"] == ours["quantized"]["first_stage"]["psnr"] > 20
    assert 0 < ours["quantized"]["first_stage"]["bytes"] < ours["quantized"]["first_stage"]["float_bytes"]
    assert 0.9 < ours["errors"]["text_cosine"] <= 1
    header, _ = table([ScoreRecord(**row) for row in (exact, ours)])
    assert {"decoder PSNR, dB ↑", "text error ↓", "text cosine ↑"} <= {*header}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("first_stage=w8a8",), "it has no first stage that could be quantized, first_stage=float"),
        (("text_encoder=w8a8",), "digits has no text encoder that could be quantized: text_encoder=float"),
        (("first_stage=w8a8", "first_stage.weight=9"), "first_stage.weight must be one of 2, 3, 4, 5, 6, 7, 8, got 9"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    overrides: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, "model=digits", "debug=smoke", "until=images", *overrides)
    assert said in " ".join(capsys.readouterr().out.split())
