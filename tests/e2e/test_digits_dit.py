"""The shipped transformer from the command line: scored, diagnosed, and what is refused for it."""

import csv
from pathlib import Path

import pytest

from tests.e2e.jobs import job
from tfmq_exp.denoisers.digits import load_denoiser, load_dit
from tfmq_exp.deploy.engine import require_executable


def test_it_is_scored_and_diagnosed(tmp_path: Path) -> None:
    scores = job(tmp_path, "model=digits_dit", "debug=smoke", "method=tfmq")
    assert (scores / "results.json").is_file()
    diagnosis = job(tmp_path, "model=digits_dit", "debug=smoke", "method=tfmq", "until=diagnose")
    assert list(diagnosis.rglob("*sensitivity*"))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "lsq_tdq method.weights.labels=null",
            "conditioned on class_labels: training needs",
        ),
    ],
)
def test_methods_that_do_not_apply_say_why(
    method: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *labels = method.split(" ", 1)
    with pytest.raises(SystemExit):
        job(tmp_path, "model=digits_dit", "debug=smoke", f"method={name}", *labels, "until=images")
    assert message in " ".join("".join(capsys.readouterr()).split())


def test_a_network_that_predicts_velocity_is_corrected_and_trained(tmp_path: Path) -> None:
    """PTQD leaves the first step as it is: its input is nothing but noise, whatever is predicted."""
    with (job(tmp_path, "model=digits_dit", "debug=smoke", "method=ptqd", "until=images") / "noise.csv").open() as file:
        first, *others = csv.DictReader(file)
    assert (float(first["t"]), float(first["sigma"])) == (1000, 0)
    assert all(float(row["sigma"]) > 0 for row in others)
    trained = job(tmp_path / "trained", "model=digits_dit", "debug=smoke", "method=duq_tdq", "until=images")
    (unit,) = csv.DictReader((trained / "units.csv").open())
    assert unit["kind"] == "training"
    assert float(unit["error_after"]) < 2  # of a velocity whose variance is about that of noise and image together


def test_engines_execute_unets_alone() -> None:
    require_executable(load_denoiser())
    with pytest.raises(ValueError, match="and this one takes class_labels: a DiTTransformer2DModel is simulated"):
        require_executable(load_dit())
