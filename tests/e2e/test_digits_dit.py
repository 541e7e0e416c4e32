"""The shipped transformer from the command line: scored, diagnosed, and what is refused for it."""

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
        ("ptqd", "takes networks that predict noise"),
        ("lsq_tdq", "takes networks that predict noise"),
    ],
)
def test_methods_that_do_not_apply_say_why(
    method: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, "model=digits_dit", "debug=smoke", f"method={method}", "until=images")
    assert message in " ".join("".join(capsys.readouterr()).split())


def test_engines_execute_unets_alone() -> None:
    require_executable(load_denoiser())
    with pytest.raises(ValueError, match="and this one takes class_labels: a DiTTransformer2DModel is simulated"):
        require_executable(load_dit())
