"""The text-to-image model of emojis from the command line, with a folder of random weights."""

import json
from pathlib import Path

from tests.e2e.jobs import job
from tests.helpers.emoji import save_untrained


def test_it_is_quantized_and_scored_on_its_prompts(tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "emoji")
    own = ("model.denoiser.path", "model.sampling.conditioning.folder", "eval.extract.folder", "data.folder")
    run = job(
        tmp_path,
        "model=emoji",
        "method=nearest",
        "debug=smoke",
        *(f"{key}={folder}" for key in own),
        "runtime.threads=1",
    )
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["quant"] for row in rows] == ["fp32", "w4a8"]
    assert all(row["evaluator"]["name"] == "emoji features" and row["scores"]["fid"] > 0 for row in rows)
    assert rows[0]["scores"] != rows[1]["scores"]
    prompts = [row["protocol"]["conditioning"][use]["path"] for row in rows for use in ("images", "calibration")]
    assert prompts == [str(folder / "evaluation.txt"), str(folder / "calibration.txt")] * 2
