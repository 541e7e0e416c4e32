"""The script that prints tables, as a user runs it: a published table beside ours."""

import csv
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest

from tfmq_exp.report.records import ScoreRecord

ROOT = Path(__file__).parents[3]


def record(method: str, quant: str, fid: float) -> ScoreRecord:
    """A run on LSUN bedrooms under the published protocol."""
    sampler = {"class": "DDIM", "num_inference_steps": 200, "eta": 1.0, "timestep_spacing": "uniform"}
    return ScoreRecord(
        model="ldm_bedroom",
        quant=quant,
        method=method,
        seed=0,
        scores={"fid": fid},
        protocol={"sampler": sampler, "network_calls": 200, "guidance": 1.0, "images": 50000},
        evaluator={"name": "Inception", "reference": "LSUN"},
        weights_bytes=400,
    )


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    """A simulation and its execution by an engine, beside a method that is simulated alone."""
    simulated = record("tfmq", "w4a8", 3.5)
    executed = dataclasses.replace(simulated, scores={"fid": 3.6}, choices={"engine": "openvino"})
    rows = [record("float", "fp32", 3.0), simulated, executed, record("brecq", "w4a8", 4.0)]
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row.to_json() for row in rows]}))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["make_tables.py", *arguments])
    return runpy.run_path(str(ROOT / "scripts" / "make_tables.py"))["main"]()


def test_the_script_prints_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [record("float", "fp32", 3.0), record("tfmq", "w4a8", 3.5)]
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row.to_json() for row in ours]}))
    assert run(monkeypatch, str(tmp_path), "--paper", "tfmq", "--table", "2") == 0
    text = capsys.readouterr().out
    assert "2.98 P \\| 3.00 (1 seed) \\| +0.02" in text
    assert "3.68 P \\| 3.50 (1 seed) \\| -0.18" in text
    assert run(monkeypatch, str(tmp_path / "none"), "--paper", "tfmq", "--table", "2", "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("bits,method,ldm_bedroom FID ↓ paper,")
    assert run(monkeypatch, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert '--paper "TFMQ-DM" --table "2"    Unconditional 256x256, LDM' in lines
    papers = [line.split('"')[1] for line in lines]
    assert list(dict.fromkeys(papers))[:4] == ["TFMQ-DM", "Q-Diffusion", "PTQD", "TDQ"]
    assert len(set(papers)) > 4
    assert run(monkeypatch, "--paper", "tfmq") == 0
    assert {line.split('"')[1] for line in capsys.readouterr().out.splitlines()} == {"TFMQ-DM"}
    assert run(monkeypatch, "--table", "2") == 1
    assert "--table 2 needs the --paper" in capsys.readouterr().err
    assert run(monkeypatch, "--paper", "tfmq", "--table", "7") == 1
    assert "there are 1, 2, 3" in capsys.readouterr().err
    assert run(monkeypatch, str(tmp_path), "--paper", "tfmq", "--table", "2", "--pivot", "fid") == 1
    assert run(monkeypatch, str(tmp_path)) == 0
    assert "**ldm_bedroom, DDIM 200 steps, eta 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("more", [(), ("--pivot", "fid"), ("--paper", "tfmq", "--table", "2")])
def test_printed_and_written_csv_are_the_same_and_read_back(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    words = (str(deployed), "--format", "csv", *more)
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert run(monkeypatch, *words, "--out", str(deployed / "table.csv")) == 0
    assert (deployed / "table.csv").read_text(encoding="utf-8") == printed
    cells = [cell for line in csv.reader(printed.splitlines()) for cell in line]
    assert not [cell for cell in cells if "\\" in cell or cell != cell.strip()]


def test_the_headline_says_which_rows_are_simulated(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(deployed)) == 0
    text = capsys.readouterr().out
    assert "simulated quantization; rows executed by openvino in integers**" in text
    assert "| w4a8 | tfmq (executed by openvino) | 3.600 |" in text
    assert run(monkeypatch, str(deployed), "--pivot", "fid", "--methods", "tfmq") == 0
    assert "| bits | tfmq | tfmq (executed by openvino) |" in capsys.readouterr().out
    assert run(monkeypatch, str(deployed), "--pivot", "fid", "--methods", "brecq") == 0
    assert ", simulated quantization**" in capsys.readouterr().out
    assert run(monkeypatch, str(deployed), "--paper", "tfmq", "--table", "2") == 0
    assert "3.50 (1 seed)" in capsys.readouterr().out  # papers simulate: an engine's row is not beside them


def test_scripts_read_outputs_where_nothing_is_given(
    deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "outputs/runs/day/one"
    run_folder.mkdir(parents=True)
    (deployed / "results.json").rename(run_folder / "results.json")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch) == 0
    assert "| tfmq |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]() == 0
    assert capsys.readouterr().out.startswith("outputs/report.html: 1 runs")
    assert (tmp_path / "outputs/report.html").is_file()


def test_the_report_lies_where_its_first_source_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "saved.jsonl"
    source.write_text((ROOT / "docs/results/compare_digits.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report.py", str(source)])
    assert runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]() == 0
    assert (tmp_path / "report.html").is_file()


def test_what_a_record_is_called_reaches_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"rows": [record("\x1b[2Jx [/]", "w4a8", 1.0).to_json()]}))
    assert run(monkeypatch, str(tmp_path)) == 0
    assert "| \\x1b[2Jx [/] |" in capsys.readouterr().out
    (tmp_path / "results.json").write_text("\x1b")
    assert run(monkeypatch, str(tmp_path), "--out", str(tmp_path / "no/where")) == 1
    assert capsys.readouterr().err.startswith("error: ")
