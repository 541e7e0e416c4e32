"""Images against the float model's, as a user compares them: a run, and the script on folders, archives and runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.e2e.jobs import job
from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.image_distances import image_distances
from tfmq_exp.pipeline.stored_images import StoredImages
from tfmq_exp.report.image_distances import read_distances

SCRIPT = Path(__file__).parents[2] / "scripts/compare_images.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("compare_images", SCRIPT)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    floor = "comparison.floor=[batch,bfloat16,threads]"
    return job(folder, "debug=smoke", "method=nearest", "until=compare", "runtime.batch_size=9", floor)


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_images.py", *map(str, arguments)])
    return script.main()


def save(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_a_run_has_every_distance_of_its_images(run: Path) -> None:
    exact, images = (torch.cat([*StoredImages(run, name)]) for name in ("float images", "images"))
    found = read_distances(run / "image_distances.csv")
    expected = image_distances(images, exact)
    assert found["quantized"].keys() == {"psnr", "ssim", "digits_features"}
    for name in ("psnr", "ssim"):
        torch.testing.assert_close(torch.tensor(found["quantized"][name]), expected[name], rtol=1e-6, atol=1e-6)
    summary = json.loads((run / "comparison.json").read_text())["quantized"]
    assert summary["images"]["psnr"]["mean"] == pytest.approx(float(expected["psnr"].mean()))
    error = float((images.double() - exact.double()).square().mean())
    assert summary["psnr"] == pytest.approx(10 * float(torch.tensor(255**2 / error).log10()), rel=1e-5)


def test_the_floor_is_of_the_first_images_made_otherwise(run: Path) -> None:
    exact, halves = (torch.cat([*StoredImages(run, name)]) for name in ("float images", "float bfloat16 images"))
    assert len(halves) == 8
    assert not torch.equal(halves, exact[:8])
    found = read_distances(run / "image_distances.csv")
    floor = found["float, another precision"]["psnr"]
    torch.testing.assert_close(torch.tensor(floor), image_distances(halves, exact[:8])["psnr"], rtol=1e-6, atol=0)
    assert min(floor) > sum(found["quantized"]["psnr"]) / 24
    assert min(found["float, another batch"]["psnr"]) > 50
    assert min(found["float, other threads"]["psnr"]) > 50


def test_the_page_of_a_run_holds_all_that_it_shows(run: Path) -> None:
    text = (run / "comparison.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert text.count('class="stage"') == 18
    assert text.count("data:image/png;base64,") == 3 * 18
    assert "another precision" in text


def test_folders_archives_and_runs_give_the_same_numbers(
    script: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, images = (torch.cat([*StoredImages(run, name)]) for name in ("float images", "images"))
    one, other = (
        save(tmp_path / "float", exact.expand(-1, 3, -1, -1)),
        save(tmp_path / "q", images.expand(-1, 3, -1, -1)),
    )
    assert call(script, monkeypatch, one, other, "--out", tmp_path / "folders") == 0
    assert call(script, monkeypatch, run, run, "--out", tmp_path / "run") == 0
    folders, stored = (read_distances(tmp_path / name / "image_distances.csv") for name in ("folders", "run"))
    of_run = read_distances(run / "image_distances.csv")["quantized"]
    for found in (folders["q"], stored["run"]):
        for name in ("psnr", "ssim"):
            assert found[name] == pytest.approx(of_run[name], rel=1e-6)
    assert "pairs to look at" in capsys.readouterr().out


def test_methods_are_told_apart_and_prompts_are_shown(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = pictures(12, 24, 0)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    folders = {
        name: save(tmp_path / name, (exact + amount * noise).round().clamp(0, 255).to(torch.uint8))
        for name, amount in (("float", 0.0), ("again", 0.3), ("near", 4.0), ("far", 9.0))
    }
    (tmp_path / "prompts.txt").write_text("\n".join(f"<b>picture {i}" for i in range(12)), encoding="utf-8")
    given = (folders["near"], folders["far"], "--floor", folders["again"], "--prompts", tmp_path / "prompts.txt")
    assert call(script, monkeypatch, folders["float"], *given, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    (psnr,) = found["paired"]["psnr"]
    assert (psnr["method"], psnr["less"], psnr["verdict"]) == ("far", "near", "worse")
    assert found["networks"]["float, again"]["psnr"]["mean"] > found["networks"][psnr["less"]]["psnr"]["mean"]
    text = (tmp_path / "out/comparison.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;picture 3" in text
    assert "<b>picture" not in text
    assert "worse" in capsys.readouterr().out


def test_errors_name_what_is_wrong(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = save(tmp_path / "float", pictures(3, 12, 0))
    less = save(tmp_path / "less", pictures(2, 12, 0))
    (tmp_path / "prompts.txt").write_text("one\n", encoding="utf-8")
    cases = {
        (exact, less): "002",
        (exact, tmp_path / "absent"): "absent is not there",
        (exact, exact, exact): "is given twice",
        (exact, exact, "--prompts", tmp_path / "prompts.txt"): "1 lines",
        (exact, exact, "--lpips", "alex", "--weights", tmp_path / "w.pth"): "alexnet-owt-7be5be79.pth",
    }
    for arguments, reason in cases.items():
        assert call(script, monkeypatch, *arguments, "--out", tmp_path / "out") == 1
        assert reason in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()
