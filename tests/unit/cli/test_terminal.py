"""What is printed reaches every terminal, file and pipe whole, and obeys nothing that is in a name."""

import io
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.table import Table

from tests.e2e.jobs import CONF
from tfmq_exp.cli.outputs.score_table import print_scores, print_sweep_scores
from tfmq_exp.cli.terminal import ProgressBars, Terminal, VisibleFormatter, say, say_error, visible
from tfmq_exp.report import tables
from tfmq_exp.report.records import ScoreRecord

pytestmark = pytest.mark.bad_input

ROOT = Path(__file__).parents[3]
NAMES = (
    "a[/]b",
    "[/bold]",
    "[bold red]x[/]",
    "[link=http://x]y[/link]",
    ":smile:",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "two\rlines",
    "\u202eback",
    "\udcff.png",
)


def record(method: str, fid: float, **choices: str) -> ScoreRecord:
    return ScoreRecord(
        model="[/]\x1b[2Jm",
        quant="fp32" if method == "float" else "w4a8",
        method=method,
        seed=0,
        scores={"fid": fid, "sfid": 2 * fid, "is": 6.25},
        protocol={"images": 8, "sampler": {"class": "DDIM", "steps": 20, "eta": 0.0}},
        evaluator={"name": "some features", "reference": "[R]"},
        weights_bytes=4_451_000,
        choices=choices,
        errors={} if method == "float" else {"trajectory": 0.2593, "temporal_relative_mse": 0.00191},
    )


def printed(width: int, encoding: str = "utf-8") -> tuple[Terminal, io.BytesIO]:
    """A terminal of a width and an encoding, and the bytes that reach it."""
    bytes_ = io.BytesIO()
    stream = io.TextIOWrapper(bytes_, encoding=encoding, errors="replace", write_through=True)
    return Terminal(file=stream, width=width), bytes_


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name: str) -> None:
    console, out = printed(200)
    say(console, f"run {name}")
    say_error(console, f"no {name}")
    view = Table(title=f"title {name}")
    view.add_column(f"heading {name}")
    view.add_row(f"cell {name}")
    console.print(view)
    said = out.getvalue().decode()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
    for where in ("run", "error: no", "title", "heading", "cell"):
        assert f"{where} {visible(name)}" in said
    formatted = VisibleFormatter("%(message)s").format(logging.LogRecord("", 0, "", 0, name, None, None))
    assert formatted == visible(name)


def test_the_log_shows_control_characters_and_is_utf_8() -> None:
    config = yaml.safe_load((CONF / "hydra/job_logging/run.yaml").read_text())
    assert {f["class"] for f in config["formatters"].values()} == {"tfmq_exp.cli.terminal.VisibleFormatter"}
    assert config["handlers"]["file"]["encoding"] == "utf-8"


def test_visible_text_keeps_what_people_write() -> None:
    text = "naïve 日本語 ± ↓ …\n\tindented [0, 1] 🙂"
    assert visible(text) == text
    assert visible("\x1b\x00\x85\x7f") == r"\x1b\x00\x85\x7f"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252", "cp437", "shift_jis", "utf-16"])
@pytest.mark.parametrize("width", [200, 80, 40, 20])
def test_tables_of_scores_are_whole_everywhere(tmp_path: Path, encoding: str, width: int) -> None:
    long = {"method/scales": "finite_set_all", "method/weights/recipe/objective": "fisher_diagonal"}
    records = [record("float", 3.5), record("tfmq", 4.125), record("tfmq", 5.0, **long), record("日本語", 5.5)]
    console, out = printed(width, encoding)
    print_scores(records, console)
    print_sweep_scores(records, tmp_path, console)
    said = out.getvalue().decode(encoding, "replace")
    for value in ("3.500", "4.125", "5.000", "5.500", "6.25", "0.2593", "0.00191", "4451"):
        assert value in said, f"{value} is cut at {width} columns in {encoding}"
    assert "…" not in said
    assert "\x1b" not in said
    framed = [line for line in said.splitlines() if line[:1] in "│┃|+┏└" and line]
    assert all(len(line) <= width for line in framed)


def test_the_file_of_a_sweep_has_every_column_and_the_means_of_the_seeds(tmp_path: Path) -> None:
    records = [record("float", 1.0), record("tfmq", 2.0)]
    other = ScoreRecord(**{**records[1].to_json(), "seed": 1, "scores": {"fid": 4.0}})
    console, out = printed(200)
    print_sweep_scores([*records, other], tmp_path, console)
    header, rows = tables.table([*records, other])
    assert tables.render(header, rows, "markdown") in (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert "3.000 ± 1.414" in out.getvalue().decode()
    assert "scores.md" in out.getvalue().decode()
    print_sweep_scores([], tmp_path / "nowhere", console)


def test_what_is_no_terminal_has_lines_in_place_of_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    console, out = printed(80)
    with ProgressBars(console, every=0.05).stage("weights", 8) as advance:
        for done in range(8):
            advance(done, "mid\x1b[31m[/]")
            time.sleep(0.02)
    lines = out.getvalue().decode().splitlines()
    assert 1 <= len(lines) <= 5
    shape = r"weights, \d+%, mid\\x1b\[31m\[/\](, [\d.]+ s left)?"
    assert all(re.fullmatch(shape, line) for line in lines), lines
    assert any(line.endswith("left") for line in lines)


def test_a_stage_that_is_over_soon_says_nothing() -> None:
    console, out = printed(80)
    with ProgressBars(console).stage("weights", 1) as advance:
        advance(1, "")
    assert not out.getvalue()


def test_work_goes_on_when_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        console = Terminal(file=stream)
        for _ in range(3):
            say(console, "a line")


def program(text: str, *, after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that uses the module, run by a shell which may close or redirect its streams."""
    lines = f"from tfmq_exp.cli.terminal import *\nimport os, sys\n{text}"
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {after}', sys.executable, lines],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "ascii:strict"])
def test_a_program_prints_any_text_in_any_encoding(encoding: str) -> None:
    done = program("with standard_streams():\n print('↓ 日本 \\udcff')", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, "? ?? ?\n", "")


def test_a_program_that_only_prints_ends_as_if_by_sigpipe_without_a_word() -> None:
    done = program("with standard_streams():\n for i in range(99999): print(i)", after="| head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


def test_a_program_that_works_goes_on_without_a_reader(tmp_path: Path) -> None:
    text = f"""with standard_streams():
 for i in range(999): say(Terminal(), 'x' * 999)
 open({str(tmp_path / "result")!r}, 'w').write('done')"""
    done = program(text, after="| head -c 3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "xxx", "")
    assert (tmp_path / "result").read_text() == "done"


def test_closed_streams_leave_their_numbers_to_no_file(tmp_path: Path) -> None:
    text = f"""with standard_streams():
 file = open({str(tmp_path / "result")!r}, 'w')
 os.write(1, b'a library')
 print('a line'); say(Terminal(), 'another'); say_error(Terminal(stderr=True), 'an error')
 file.write('done')"""
    done = program(text, after="<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "result").read_text() == "done"


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")


@full
@pytest.mark.parametrize("size", [1, 100_000])
def test_what_cannot_be_written_is_an_error(size: int) -> None:
    """Also where it is less than a buffer holds, which is first written at the end."""
    done = program(f"with standard_streams():\n print('x' * {size})", after="> /dev/full")
    assert done.returncode == 1
    assert done.stderr == "error: what is printed cannot be written: No space left on device\n"


@full
def test_another_file_that_cannot_be_written_is_its_own_error() -> None:
    done = program("with standard_streams():\n print('x'); open('/dev/full', 'w', buffering=1).write('y\\n')")
    assert (done.returncode, done.stdout.strip()) == (1, "x")
    assert "what is printed" not in done.stderr


@full
def test_work_goes_on_where_its_messages_cannot_be_written(tmp_path: Path) -> None:
    text = f"""with standard_streams():
 for i in range(3): say(Terminal(), f'line {{i}}')
 open({str(tmp_path / "result")!r}, 'w').write('done')"""
    done = program(text, after="> /dev/full")
    assert done.returncode == 0
    assert done.stderr.count("error: what is printed cannot be written: No space left on device; the work goes on") == 1
    assert (tmp_path / "result").read_text() == "done"


@pytest.mark.parametrize("columns", ["0", "00", "", "abc", "-5"])
def test_a_width_that_is_none_is_the_usual_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = io.StringIO()
    console = Terminal(file=stream)
    say(console, "a line")
    print_sweep_scores([record("float", 1.0), record("brecq", 2.0)], tmp_path, console)
    assert "a line\n" in stream.getvalue()
    assert "brecq" in stream.getvalue()
