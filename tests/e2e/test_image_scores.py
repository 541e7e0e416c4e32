"""Scores of single images in a whole job: means in the table, every image's in the store."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.jobs import job


def test_a_job_keeps_the_score_of_every_image(tmp_path: Path) -> None:
    score = "+eval.image_scores.grey._target_=tests.helpers.evaluation.MeanGrey"
    run = job(tmp_path, "debug=smoke", "method=nearest", score)
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert rows[0]["evaluator"]["image_scores"] == {"grey": {"metric": "mean grey"}}
    kept = [load_file(path)["grey"] for path in sorted(tmp_path.rglob("image_scores.safetensors"))]
    assert [len(values) for values in kept] == [24, 24]
    means = sorted(float(values.double().mean()) for values in kept)
    assert sorted(row["scores"]["grey"] for row in rows) == pytest.approx(means, rel=1e-6)
    stages = json.loads((run / "artifacts.json").read_text())
    folders = [Path(stages[name]["path"]) for name in ("images", "float images")]
    images = [load_file(folder / "images-000000.safetensors")["images"] for folder in folders]
    first = [float(batch[0].double().mean()) for batch in images]
    assert sorted(float(values[0]) for values in kept) == pytest.approx(sorted(first), rel=1e-5)
