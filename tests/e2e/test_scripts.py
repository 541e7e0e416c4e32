"""The scripts, run as a user runs them but inside the test process."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.e2e.jobs import job
from tfmq_exp.denoisers.digits import DigitClassifier, load_classifier
from tfmq_exp.denoisers.originals import compvis_unet

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests/goldens/reference_run/ldm"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int | None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return script(name).main()


def test_training_resumes_and_keeps_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ("--out", str(tmp_path / "out"), "--weights", str(tmp_path / "weights"), "--batch", "4")
    call(monkeypatch, "train_digits", "classifier", "--steps", "100", *places)
    first = load_file(tmp_path / "weights/classifier.safetensors")
    call(monkeypatch, "train_digits", "classifier", "--steps", "100", *places)  # as after a kill once trained
    again = load_file(tmp_path / "weights/classifier.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(ValueError, match="of step 100, beyond --steps 50"):
        call(monkeypatch, "train_digits", "classifier", "--steps", "50", *places)
    call(monkeypatch, "train_digits", "classifier", "--steps", "150", *places)
    steps = [
        int(row["step"]) for row in csv.DictReader((tmp_path / "weights/classifier.log.csv").open()) if row["loss"]
    ]
    assert steps == [49, 99, 149]
    second = load_file(tmp_path / "weights/classifier.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    record = json.loads((tmp_path / "weights/classifier.json").read_text())
    _, sha256 = load_classifier(str(tmp_path / "weights/classifier.safetensors"))
    assert record["sha256"] == sha256
    assert record["parameters"] == sum(p.numel() for p in DigitClassifier().parameters())


def test_the_shipped_weights_are_those_of_their_records() -> None:
    import hashlib

    weights = ROOT / "tfmq_exp/denoisers/weights"
    for record in weights.glob("*.json"):
        wanted = json.loads(record.read_text())["sha256"]
        assert hashlib.sha256((weights / f"{record.stem}.safetensors").read_bytes()).hexdigest() == wanted


def test_tables_from_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job(tmp_path, "debug=smoke", "method=nearest")
    capsys.readouterr()
    assert call(monkeypatch, "make_tables", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "| fp32 | float |" in said
    assert "| w4a8 | nearest |" in said
    assert "simulated quantization" in said
    assert call(monkeypatch, "make_tables", str(tmp_path / "nothing")) == 1
    assert "no results.json" in capsys.readouterr().err


def test_the_comparison_with_the_original_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At two iterations only what does not depend on learning can hold: float outputs and sizes."""
    call(monkeypatch, "compare_reference", str(REFERENCE), "--iterations", "2")
    said = capsys.readouterr().out
    assert "86.0% of all" in said
    assert "MISSED" not in said


GOLDENS = ROOT / "tests/goldens/compvis"
RECIPE = {
    "w_bits": 4,
    "a_bits": 8,
    "iters": 2,
    "batch_size": 4,
    "w": 0.01,
    "p": 2.0,
    "warmup": 0.2,
    "b_range": [20, 2],
    "samples_per_step": 4,
}


@pytest.mark.parametrize("case", ["ldm_cin256_v2", "ddim_cifar10"])
def test_the_comparison_takes_other_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Cross-attention context and DDIM networks: folders of the same layout, made here from the original checkpoints."""
    config = yaml.safe_load((GOLDENS / f"{case}.config.yaml").read_text())
    state = {k: v.float() for k, v in load_file(GOLDENS / f"{case}.model.safetensors").items()}
    if "data" in config:
        architecture = {"cls": "ddim", "config": config}
    else:
        architecture = {"cls": "ldm", "kwargs": config["model"]["params"]["unet_config"]["params"]}
        prefix = "model.diffusion_model."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    network = compvis_unet.load_unet(architecture, state)
    generator = torch.Generator().manual_seed(0)
    tensors = {"tsteps": torch.tensor([1, 501])}
    for part, output in (("cali", "fp_out"), ("held", "fp_out_held")):
        x = torch.randn(8, network.config["in_channels"], 8, 8, generator=generator)
        t = torch.tensor([501] * 4 + [1] * 4)
        context = {}
        if "cross_attention_dim" in network.config:
            context["encoder_hidden_states"] = torch.randn(
                8, 1, network.config["cross_attention_dim"], generator=generator
            )
            tensors[f"{part}.c"] = context["encoder_hidden_states"]
        tensors |= {f"{part}.x": x, f"{part}.t": t.float(), output: network(x, t, **context).sample}
    save_file(state, tmp_path / "init_state.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "data.safetensors")
    (tmp_path / "reference.json").write_text(json.dumps({"architecture": architecture, "recipe": RECIPE, "runs": {}}))
    assert call(monkeypatch, "compare_reference", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "float outputs differ from the original's by at most 0.0e+00" in said
    assert "temporal feature cosine" in said
    if case == "ldm_cin256_v2":  # takes half a minute
        return
    monkeypatch.syspath_prepend(ROOT / "scripts")
    call(monkeypatch, "bench_reconstruction", str(tmp_path), "--seeds", "0", "--save", str(tmp_path / "numbers.json"))
    runs = json.loads((tmp_path / "numbers.json").read_text())["recipes"]
    plain, ours = (list(runs[name][0]["errors"].values()) for name in ("plain", "AdaRound"))
    assert ours[:2] == pytest.approx(plain[:2], rel=1e-3)  # the same recipe, by autograd and with gradients written out
    assert all(run[0]["seconds"]["learning"] > 0 for name, run in runs.items() if name != "GPTQ")


def test_a_reference_folder_that_lacks_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "init_state.safetensors")
    with pytest.raises(SystemExit):
        call(monkeypatch, "compare_reference", str(tmp_path))
    assert "reference.json" in capsys.readouterr().err
