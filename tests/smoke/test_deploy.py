"""The finished model executed by an engine, as a row beside the simulated one."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.smoke.jobs import job
from tfmq_exp.deploy.onednn_engine import available

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def hits(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifacts.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["rows"]


def run(folder: Path, store: Path, *words: str) -> Path:
    return job(folder, "method=nearest", "runtime=smoke", f"paths.store={store}", *words)


def test_a_row_of_its_own_with_keys_of_its_own(tmp_path: Path, store: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    alone = run(tmp_path / "alone", store)
    folder = run(tmp_path / "both", store, "engine=openvino", "runtime.threads=1")
    simulated, deployed = rows(folder)[1:]
    assert deployed["choices"] == {"engine": "openvino"}
    assert simulated["scores"] == rows(alone)[1]["scores"]
    assert deployed["errors"]["trajectory"] == pytest.approx(simulated["errors"]["trajectory"], rel=1)
    found = hits(folder)
    for stage in ("images", "scores", "diagnostics"):
        assert found[stage]["key"] == hits(alone)[stage]["key"], "the simulation knows nothing of engines"
        assert found[f"openvino {stage}"]["key"] != found[stage]["key"]
    lines = list(csv.DictReader((folder / "sites.csv").open()))
    assert {line["executed"] for line in lines} == {"int8"}
    assert (Path(found["openvino"]["path"]) / "model.xml").is_file()

    again = run(tmp_path / "again", store, "engine=openvino", "goal=export", "runtime.threads=1")
    assert not [name for name, hit in hits(again).items() if hit["computed"]]
    assert "openvino" in hits(again)


def test_inside_torch(tmp_path: Path, store: Path) -> None:
    if not available():
        pytest.skip("this build of torch has no oneDNN operators for integers")
    folder = run(tmp_path, store, "engine=onednn")
    assert rows(folder)[2]["choices"] == {"engine": "onednn"}
    assert hits(folder)["onednn images"]["computed"]


def test_export_needs_an_engine(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, store, "goal=export")
    assert "engine=openvino or engine=onednn" in " ".join(capsys.readouterr().out.split())
