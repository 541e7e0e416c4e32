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

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from tests.e2e.jobs import CONF, composed
from tests.e2e.test_models import GOLDENS, checkpoint
from tests.e2e.test_scripts import call
from tests.helpers.run_folders import Reader
from tfmq_exp.cli.finished_jobs import job_identity
from tfmq_exp.cli.job import perform
from tfmq_exp.denoisers.families.find import family_of
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_unet: nn.Module) -> Path:
    """What a user has: a diffusers folder, a feature extractor, an original checkpoint with its configuration, images."""
    root = tmp_path_factory.mktemp("files")
    saved: Any = tiny_unet
    saved.save_pretrained(root / "flowers-ddpm/unet")
    DDPMScheduler().save_pretrained(root / "flowers-ddpm/scheduler")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ResNetForImageClassification(config).save_pretrained(root / "resnet-flowers")
    (root / "cars256").mkdir()
    checkpoint("ldm_lsun_beds", root / "cars256")
    (root / "cars256/config.yaml").write_text((GOLDENS / "ldm_lsun_beds.config.yaml").read_text())
    (root / "flowers").mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"flowers/{i}.png")
    return root


def frechet(one: Tensor, other: Tensor) -> float:
    """The distance of two Gaussians, from its formula."""
    (m1, m2), (s1, s2) = (np.mean(x, 0) for x in (one, other)), (np.cov(x, rowvar=False) for x in (one, other))
    roots = np.sqrt(np.clip(np.linalg.eigvals(s1 @ s2).real, 0, None))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.sum())


def test_a_diffusers_folder_and_the_extractor(lab: Path, files: Path, tmp_path: Path) -> None:
    places = (f"paths.checkpoints={files}", f"paths.data={files}", "data.size=8", "eval.extract.side=32")
    found = run(lab, tmp_path, "model=flowers", "method=nearest", *places, "protocol.sampling.images=16")
    row = rows(found)[1]
    assert row["model"] == "flowers"
    assert row["evaluator"]["name"] == "ResNet flowers"
    extractor = importlib.import_module("ideas.resnet_extractor")
    extract = extractor.resnet_extractor(str(files / "resnet-flowers"), side=32, version=1)
    assert row["evaluator"]["sha256"] == extract.identity["sha256"]
    images = torch.cat([load_file(file)["images"] for file in sorted(stored(found, "images").glob("*.safetensors"))])
    real = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in (files / "flowers").glob("*.png")])
    features = (extract(x).pooled.double().numpy() for x in (torch.tensor(real), images))
    assert row["scores"]["fid"] == pytest.approx(frechet(*features), rel=1e-3)


def test_an_original_checkpoint(lab: Path, files: Path, tmp_path: Path) -> None:
    places = (f"paths.checkpoints={files}", f"data.path={files / 'flowers'}", "data.size=64")
    found = run(lab, tmp_path, "model=ldm_cars", "method=nearest", "until=trajectory", *places)
    inputs = json.loads((stored(found, "trajectory") / "inputs.json").read_text())
    assert inputs["model"] == "ldm_cars"
    cfg = OmegaConf.load(found / "config.yaml")
    assert cfg.model.denoiser.config == str(files / "cars256/config.yaml")
    assert cfg.protocol.sampling.eta == 0.0  # ldm_bedroom: 1


def test_another_family_is_asked_for() -> None:
    with pytest.raises(ValueError, match="a Linear is a denoiser of no known family; known: UNet2DModel") as error:
        family_of(nn.Linear(1, 1))
    assert f"*{str(error.value).split(';')[0]}*" in " ".join(PAGE.split())


def failure(capsys: pytest.CaptureFixture[str], lab: Path, folder: Path, *overrides: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(lab, folder, "method=nearest", "method/scales=envelope", *overrides)
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("error:"))


def test_a_wrong_name_lists_the_right_ones(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingConfigException) as error:
        composed(tmp_path, searched(lab), "method=tfmq_ptqt")
    assert "Could not find 'method/tfmq_ptqt'" in PAGE
    assert "Could not find 'method/tfmq_ptqt'" in str(error.value)
    assert "tfmq_ptqd" in str(error.value)
    assert str(lab / "conf") in str(error.value)


def test_what_is_wrong_in_a_record(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, lab, tmp_path, "+method.scales.default.radios=2")
    assert said.removeprefix("error: ") in PAGE


def test_a_package_that_python_does_not_find(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(lab)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "ideas"]:
        monkeypatch.delitem(sys.modules, name)
    said = failure(capsys, lab, tmp_path)
    for part in ("Error loading 'ideas.envelope.EnvelopeConfig'", "No module named 'ideas'"):
        assert part in PAGE
        assert part in said


def test_a_scale_that_cannot_be_stored(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = importlib.import_module("ideas.envelope").EnvelopeConfig
    monkeypatch.setattr(config, "tabulated", lambda self: self)
    said = failure(capsys, lab, tmp_path, "until=activations")
    assert "cannot be stored; classes that can:" in PAGE
    assert "cannot be stored; classes that can:" in said
