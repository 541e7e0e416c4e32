"""What the README tells a user to type exists and composes."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from tests.e2e.jobs import composed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
RUNS = sorted({line for line in LINES if line.startswith("python run.py")})
SCRIPTS = sorted({line.split()[1] for line in LINES if line.startswith("python scripts/")})
TARGETS = sorted({line.split()[1] for line in LINES if line.startswith("make ")})


def swept(word: str) -> list[str]:
    """The overrides of a sweep's jobs that one word of its command stands for."""
    key, _, values = word.partition("=")
    return [f"{key}={value}" for value in values.split(",")]


@pytest.mark.parametrize("line", RUNS)
def test_every_run_composes(tmp_path: Path, line: str) -> None:
    words = [word for word in shlex.split(line)[2:] if not word.startswith("-") and word != "job"]
    sweeps = [[word] if "{" in word or "[" in word else swept(word) for word in words]
    for job in itertools.product(*sweeps):
        composed(tmp_path, *job)


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_script_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_pages_were_read() -> None:
    assert len(RUNS) > 8
    assert len(SCRIPTS) >= 4
    assert {"run", "test"} <= set(TARGETS)
