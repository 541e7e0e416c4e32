"""Training with quantizers in the network, from configuration to tables, at the smoke size."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.jobs import job
from tfmq_exp.data.digits import load_images
from tfmq_exp.qat.dataset import TrainingSet
from tfmq_exp.report.records import read_records
from tfmq_exp.report.tables import by_protocol, table
from tfmq_exp.surgery import serialization

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

SMOKE = ("debug=smoke", "quant=w3a3", "device=cpu", "runtime.threads=1", "protocol.sampling.images=8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LSQ with TDQ's steps."""
    return job(tmp_path_factory.mktemp("qat"), *SMOKE, "method=lsq_tdq")


def hits(run: Path) -> dict[str, Any]:
    return json.loads((run / "artifacts.json").read_text())


def test_it_trains_on_images_and_follows_no_trajectory(run: Path) -> None:
    stages = hits(run)
    assert {"examples", "weights", "activations", "images", "scores"} <= stages.keys()
    assert "trajectory" not in stages
    assert len(TrainingSet.load(Path(stages["examples"]["path"]))) == len(load_images()[0])
    left = {path.name for path in Path(stages["weights"]["path"]).iterdir()}
    assert left == {
        "inputs.json",
        "losses.json",
        "manifest.json",
        "trained.safetensors",
        "units",
        "units.json",
    }


def test_what_it_leaves_is_what_every_method_leaves(run: Path) -> None:
    losses = list(csv.DictReader((run / "losses.csv").open()))
    assert [int(row["iteration"]) for row in losses] == [1, 2, 3, 4]
    (unit,) = csv.DictReader((run / "units.csv").open())
    assert (unit["kind"], int(unit["weights"])) == ("training", 1_112_801)
    row = json.loads((run / "results.json").read_text())["rows"][1]
    assert (row["cost"]["weight_iterations"], row["cost"]["weight_samples"]) == (4, 16)
    assert row["cost"]["training_images"] == 1797
    assert row["cost"]["quantization_seconds"] > 0
    model = serialization.load(Path(hits(run)["activations"]["path"]) / "quantized.safetensors")
    assert (
        len(model.integers) == len(model.weight_layers()) == json.loads((run / "quantized.json").read_text())["layers"]
    )
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(2, 1, 16, 16), model.context.timesteps[1]).sample).all()


def test_another_sampler_needs_no_other_training_and_all_stand_in_one_table(run: Path) -> None:
    before, store = hits(run), f"paths.store={run.parent / 'store'}"
    steps = ("protocol.sampling.num_inference_steps=5", "until=activations")
    again = hits(job(run.parent / "again", *SMOKE, "method=lsq_tdq", *steps, store))
    assert (again["weights"]["key"], again["weights"]["computed"]) == (before["weights"]["key"], False)
    assert again["activations"]["key"] != before["activations"]["key"]
    other = job(run.parent / "other", *SMOKE, "method=nearest", "quant=w4a4", store)
    records = read_records(run.parent)
    (group,) = by_protocol(records)
    _, rows = table(group)
    assert [row[:2] for row in rows] == [["fp32", "float"], ["w4a4", "nearest"], ["w3a3", "lsq_tdq"]]
    assert "trajectory" in hits(other)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (("method/scales=finite_set_all",), "training needs scales for any timestep"),
        (
            ("method/scales=timestep_groups", "method.scales.temporal.count=20"),
            "would be trained with 20 intervals, and the sampler's 4 steps fall into 4 of them",
        ),
    ],
)
def test_scales_that_cannot_be_trained_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scales: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, *SMOKE, "method=lsq", *scales, "protocol.sampling.num_inference_steps=4")
    assert said in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.rglob("trained.safetensors"))
