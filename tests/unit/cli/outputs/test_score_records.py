"""What records say of how their numbers were made."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.jobs import composed
from tfmq_exp.cli.make_run import make_run
from tfmq_exp.cli.outputs.score_records import protocol, settings
from tfmq_exp.denoisers.digits import WEIGHTS


def test_settings_tell_trainings_apart_and_seeds_not(tmp_path: Path) -> None:
    def of(*overrides: str) -> dict[str, str]:
        return settings(composed(tmp_path, "method=lsq_tdq", "quant=w4a4", *overrides), overrides)

    plain = of()
    assert plain["named"] == ""
    assert of("seed=3") == plain
    assert of("runtime.threads=1", "protocol.sampling.images=32")["hash"] == plain["hash"]
    faster = of("protocol.qat.learning_rate=0.01", "seed=1")
    assert faster["named"] == "qat.learning_rate=0.01"
    preset = of("experiment=qat_digits")
    assert preset["named"] == "experiment=qat_digits"
    assert len({plain["hash"], faster["hash"], preset["hash"]}) == 3


def test_a_protocol_tells_networks_apart(tmp_path: Path) -> None:
    """By the hash of their weights and by their noise schedule: both go by one name."""

    def of(*overrides: str) -> Any:
        return make_run(composed(tmp_path, "debug=smoke", *overrides), torch.device("cpu"), tmp_path)

    tensors = load_file(WEIGHTS / "denoiser.safetensors")
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] + 1}, tmp_path / "other.safetensors")
    plain, other = of(), of(f"model.denoiser.path={tmp_path}/other.safetensors")
    assert plain.denoiser.name == other.denoiser.name
    first, second = protocol(plain), protocol(other)
    assert first["network"]["weights_sha256"] == plain.denoiser.weights_sha256
    assert first["network"]["schedule"]["beta_end"] == 0.02
    assert {key for key in first if first[key] != second[key]} == {"network"}
    assert protocol(of("seed=1")) == first
    half = protocol(of("model.sampling.precision=bfloat16"))
    assert {key for key in first if first[key] != half[key]} == {"precision"}
    assert json.loads(json.dumps(first)) == first
