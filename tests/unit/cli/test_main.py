"""Which captions a run uses, and what it says of them."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.jobs import composed
from tfmq_exp.cli.make_run import make_sampling
from tfmq_exp.cli.outputs.run_folder import warn_of_captions
from tfmq_exp.sampling.conditioning import Captions, Unconditional

pytestmark = pytest.mark.bad_input


def test_captions_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "my captions.txt"
    file.write_text("a cat\ntwo dogs\n")
    wanted = Captions.read(str(file))
    folder = ("model=diffusers", "sampler=ddim", "path=nowhere", "data.path=x", "data.size=8")
    assert make_sampling(composed(tmp_path, *folder)).conditioning == Unconditional()
    assert make_sampling(composed(tmp_path, *folder, f"captions='{file}'")).conditioning == wanted
    target = "model.sampling.conditioning._target_=tfmq_exp.sampling.conditioning.Captions.read"
    long = composed(tmp_path, *folder, target, f"+model.sampling.conditioning.path='{file}'")
    assert make_sampling(long).conditioning == wanted
    instead = composed(tmp_path, "model=sd_v1_4", f"model.sampling.conditioning.path='{file}'", f"captions='{file}'")
    assert make_sampling(instead).conditioning == wanted


@pytest.mark.parametrize(
    ("captions", "images", "lines"),
    [
        ({}, 24, []),
        ({"different": 24, "cut": 0, "tokens": 77}, 24, []),
        ({"different": 2, "cut": 0, "tokens": 77}, 24, ["24 images have 2 different captions"]),
        (
            {"different": 24, "cut": 3, "tokens": 77},
            24,
            ["3 of 24 captions are longer than the text model takes, and are cut to 77 tokens"],
        ),
    ],
)
def test_what_is_said(
    captions: dict[str, int], images: int, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run: Any = SimpleNamespace(captions=captions, images=SimpleNamespace(count=images))
    with caplog.at_level(logging.WARNING):
        warn_of_captions(run)
    assert [record.getMessage() for record in caplog.records] == lines
