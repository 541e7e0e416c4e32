"""The guide to extending the project: every file that it shows is written outside the project, and does what the guide says."""

import csv
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.e2e.jobs import CONF, composed
from tests.e2e.test_scripts import call
from tests.helpers.run_folders import Reader
from tfmq_exp.cli.finished_jobs import job_identity
from tfmq_exp.cli.job import perform
from tfmq_exp.pipeline.store import canonical
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

ROOT = CONF.parent
PAGE = (ROOT / "docs/extend.md").read_text()
FILES = dict(re.findall(r"`(lab/\S+)`[^`\n]*\n```(?:yaml|python)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [
    line.split(" #")[0] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
SMALL = ("debug=smoke", "protocol.reconstruction.iterations=1", "protocol.sampling.images=8")
METHODS = ("tfmq", "tfmq (method/scales=envelope)", "tfmq_ptqd")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the guide, its package importable."""
    root = tmp_path_factory.mktemp("extended")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "lab")
        yield root / "lab"
    for name in [name for name in sys.modules if name.partition(".")[0] == "ideas"]:
        del sys.modules[name]


def searched(lab: Path) -> str:
    """What `--config-dir` does, as an override."""
    return f"hydra.searchpath=[file://{lab / 'conf'}]"


def run(lab: Path, folder: Path, *overrides: str) -> Path:
    perform(composed(folder, searched(lab), *SMALL, *overrides))
    return folder / "run"


def rows(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())["rows"]


def stored(run: Path, stage: str) -> Path:
    return Path(json.loads((run / "artifacts.json").read_text())[stage]["path"])


@pytest.fixture(scope="module")
def compared(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of TFMQ-DM, of the guide's source and of its variant, by the names of their rows; told to one ledger."""
    root = tmp_path_factory.mktemp("compared")
    shared = (f"paths.store={root / 'store'}", "logger=ledger", f"logger.file={root / 'ledger.jsonl'}")
    chosen = (("method=tfmq",), ("method=tfmq", "method/scales=envelope"), ("method=tfmq_ptqd",))
    return {
        name: run(lab, root / str(i), *words, *shared)
        for i, (name, words) in enumerate(zip(METHODS, chosen, strict=True))
    }


def root_of(compared: dict[str, Path]) -> Path:
    return compared["tfmq"].parents[1]


def test_every_block_with_a_file_was_read() -> None:
    assert len(FILES) == PAGE.count("```yaml\n") + PAGE.count("```python\n")
    assert {Path(name).parent.name for name in FILES} == {
        *("method", "scales", "model", "protocol", "eval", "logger", "launcher", "ideas"),
    }
    assert len(PAGE.splitlines()) <= 200


def test_every_command_composes(lab: Path, tmp_path: Path) -> None:
    lines = [shlex.split(line) for line in COMMANDS if line.startswith("python run.py")]
    assert len(lines) >= 2
    for line in lines:
        assert line[2:4] == ["--config-dir", "lab/conf"]
        words = [word for word in line[4:] if not word.startswith("-")]
        sweeps = [
            [f"{key}={value}" for value in values.split(",")] for key, _, values in (w.partition("=") for w in words)
        ]
        for job in itertools.product(*sweeps):
            composed(tmp_path, searched(lab), *job)


def test_the_project_comes_first_and_a_machine_is_read(lab: Path, tmp_path: Path) -> None:
    for group, text in (("method/nearest", "name: mine"), ("local/default", (CONF / "local.example.yaml").read_text())):
        (tmp_path / "lab/conf" / group).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"lab/conf/{group}.yaml").write_text(text)
    cfg = composed(tmp_path, searched(tmp_path / "lab"), "method=nearest")
    assert cfg.method.name == "nearest"
    if not (CONF / "local/default.yaml").exists():
        assert cfg.paths.checkpoints == "/datasets/checkpoints"


def test_ranges_reach_as_far_as_their_neighbours(lab: Path) -> None:
    timesteps, spec = (751, 501, 251, 1), QuantSpec(8)
    context = TimestepContext(timesteps)
    t = torch.tensor(timesteps).repeat_interleave(6)
    x = torch.randn(len(t), 5, generator=torch.Generator().manual_seed(0)) * t[:, None].double().sqrt()
    config = importlib.import_module("ideas.envelope").EnvelopeConfig
    with pytest.raises(ValueError, match="at least 0, got -1"):
        config(radius=-1)
    for radius in (0, 1, 7):
        source = config(radius=radius, momentum=0.0).build(spec, context)
        with context.at(t):
            source.observe(x.float())
        for step in range(4):
            near = torch.cat([x[t == timesteps[k]] for k in range(4) if abs(k - step) <= radius])
            lo, hi = min(0.0, float(near.min())), max(0.0, float(near.max()))
            assert float(source.scale[step]) == pytest.approx((hi - lo) / 255, rel=1e-5)
            assert float(source.zero_point[step]) == round(-lo * 255 / (hi - lo))


def test_the_source_is_in_the_stored_model(compared: dict[str, Path]) -> None:
    plain, envelope = (
        {
            name: value
            for name, value in load_file(stored(compared[row], "activations") / "quantized.safetensors").items()
            if name.startswith("activations/") and name.endswith("/scale")
        }
        for row in METHODS[:2]
    )
    rest = [name for name, scale in plain.items() if len(scale) == 1]
    temporal = [name for name, scale in plain.items() if len(scale) == 4]
    assert len(rest) > 20
    for name in rest:
        first, second, third, fourth = envelope[name].tolist()
        assert first <= second * 1.00001  # the second step's range holds the first's
        assert fourth <= third * 1.00001
    assert all(torch.equal(envelope[name], plain[name]) for name in temporal)


def test_the_variant_corrects_noise_and_shares_the_weights(compared: dict[str, Path]) -> None:
    tfmq, variant = compared["tfmq"], compared["tfmq_ptqd"]
    assert len([*csv.DictReader((variant / "noise.csv").open())]) == 4
    assert not (tfmq / "noise.csv").exists()
    assert OmegaConf.load(variant / "config.yaml").method.correction.sigma == "per_sample"
    assert stored(variant, "activations") == stored(tfmq, "activations")
    assert rows(variant)[1]["scores"]["fid"] != rows(tfmq)[1]["scores"]["fid"]


def test_rows_stand_beside_tfmq_in_tables_and_page(
    compared: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = root_of(compared)
    capsys.readouterr()
    assert call(monkeypatch, "make_tables", str(root)) == 0
    table = capsys.readouterr().out
    assert table.count("**") == 2  # one table: the protocol is the same
    assert [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| w4a8")] == sorted(METHODS)
    assert call(monkeypatch, "report", str(root), "-o", str(root / "report.html")) == 0
    page = Reader((root / "report.html").read_text())
    names = [re.findall(r"[\w=]+", line[1][1]) for line in page.tables["table-1"][1:]]
    assert names == [["float"], ["tfmq"], ["tfmq", "scales=envelope"], ["tfmq_ptqd"]]


def test_the_ledger_has_every_run(compared: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (root_of(compared) / "ledger.jsonl").read_text().splitlines()]
    scores = [line["scores/fid"] for line in lines if "scores/fid" in line]
    assert scores == [rows(run)[1]["scores"]["fid"] for run in compared.values()]


def test_a_sweep_with_the_launcher_finds_the_same_job(lab: Path, compared: dict[str, Path]) -> None:
    root = root_of(compared)
    places = (f"paths.outputs={root / 'sweep'}", f"paths.store={root / 'store'}", "logger=ledger")
    words = ("-m", "method=tfmq_ptqd", "launcher=workstation", "hydra.launcher.n_jobs=2", *SMALL, *places)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--config-dir", str(lab / "conf"), *words],
        env={**os.environ, "PYTHONPATH": str(lab), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Joblib.Parallel(n_jobs=2" in done.stdout
    assert "1 found; 0 of" in done.stdout
    [found] = (root / "sweep").rglob("results.json")
    assert found.read_bytes() == (compared["tfmq_ptqd"] / "results.json").read_bytes()


def test_changed_code_is_another_job_and_another_stage(lab: Path, tmp_path: Path) -> None:
    job = composed(tmp_path, searched(lab), "method/scales=envelope")
    file = lab / "ideas/envelope.py"
    code, seen = file.read_text(), []
    try:
        for line in ("", "# another thought\n", ""):
            file.write_text(code + line)
            seen.append((job_identity(job, ()), canonical(instantiate(job.method.scales.default))))
    finally:
        file.write_text(code)
    assert seen[0] == seen[2]
    assert seen[0][0] != seen[1][0]
    assert {key for key in seen[0][1] if seen[0][1][key] != seen[1][1][key]} == {"code"}
    assert seen[0][1] | {"code": ""} == {
        "class": "EnvelopeConfig", "module": "ideas.envelope", "code": "", "radius": 1, "momentum": 0.95,
        "int_range": "full", "observer": {"class": "MinMax", "include_zero": False},
    }  # fmt: skip
