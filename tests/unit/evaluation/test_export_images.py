"""Images of a run as a sample file and as PNGs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.evaluation import pictures
from tfmq_exp.pipeline.store import Store

SCRIPT = Path(__file__).parents[3] / "scripts/export_images.py"


def finished_run(root: Path, images: Tensor, name: str = "images") -> Path:
    """A run folder as `run.py` leaves it, started from `root`: shards in the store, its path relative to there."""
    run = root / "outputs/runs/today"
    run.mkdir(parents=True, exist_ok=True)
    store = Store(root / "outputs/store")
    entry = store.entry("images", {"name": name})

    def compute(folder: Path) -> None:
        start = 0
        for shard in images.split(4):
            save_file({"images": shard.contiguous()}, folder / f"images-{start:06d}.safetensors")
            start += len(shard)

    store.get_or_compute(entry, compute)
    record = run / "artifacts.json"
    hits = json.loads(record.read_text()) if record.is_file() else {}
    hits[name] = {"key": entry.key, "path": str(entry.path.relative_to(root))}
    record.write_text(json.dumps(hits))
    return run


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    specification = importlib.util.spec_from_file_location("export_images", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["export_images.py", *map(str, arguments)])
    return module.main()


def test_a_sample_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, originals = pictures(10, 8, 0), pictures(10, 8, 1)
    run = finished_run(tmp_path, images)
    finished_run(tmp_path, originals, "float images")
    for expected, options in ((images, ()), (originals, ("--float",))):
        assert export(monkeypatch, run, "--npz", tmp_path / "out/samples.npz", *options) == 0
        with np.load(tmp_path / "out/samples.npz") as file:
            assert file.files == ["arr_0"]
            np.testing.assert_array_equal(file["arr_0"], expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    images = pictures(10, 8, 0, channels)
    assert export(monkeypatch, finished_run(tmp_path, images), "--png", tmp_path / "out") == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(10)]
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as picture:
            assert picture.mode == ("L" if channels == 1 else "RGB")
            pixels = np.asarray(picture).reshape(8, 8, channels)
        np.testing.assert_array_equal(pixels, image.permute(1, 2, 0).numpy())


def test_what_cannot_be_exported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = finished_run(tmp_path, pictures(6, 8, 0)), tmp_path / "samples.npz"

    def failure(*arguments: object) -> str:
        assert export(monkeypatch, *arguments) == 1
        return capsys.readouterr().err

    assert "no artifacts.json" in failure(tmp_path, "--npz", target)
    assert "has no float images" in failure(run, "--npz", target, "--float")
    (tmp_path / "png").mkdir()
    (tmp_path / "png/other.png").write_bytes(b"")
    assert "not empty" in failure(run, "--png", tmp_path / "png")
    shard = next(tmp_path.rglob("images-000004.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "damaged" in failure(run, "--npz", target)
    (shard.parent / "manifest.json").unlink()
    assert "no longer in the store" in failure(run, "--npz", target)
    assert not target.exists()
