"""Attention in bfloat16: the noise that an export states, the choice on opening, and what the processor computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.deployed import inputs, model_of, one_level_unet, small_unet
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.surgery.config import AttentionBits
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

pytest.importorskip("openvino", reason="openvino is not installed")

from tfmq_exp.deploy.openvino import runtime
from tfmq_exp.deploy.openvino.attention import MIN_SCORES, AttentionNoise, attention_rows, bf16_noise
from tfmq_exp.deploy.openvino.export import export, pairs_saturate
from tfmq_exp.deploy.openvino.runtime import ExportedUNet, attention_model, attention_nodes


def operands(width: int = 32, scores: float = 1.0) -> list[Tensor]:
    """q, k, v of two heads and 64 tokens; `scores` is the standard deviation of the scores."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, width, generator=generator) for _ in range(3))
    return [scores * q, k, v]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def executed(given: list[Tensor], scores: str | None) -> Tensor:
    """Absolute values of the attention as the processor computes it."""
    model = attention_model(*given[0].shape, scores)
    compiled = runtime.ov.Core().compile_model(model, "CPU", runtime.compile_settings(1, "f32"))
    return torch.from_numpy(compiled([x[None].numpy() for x in given])[0][0])


def noise_of(found: Tensor, expected: Tensor) -> float:
    step = float(expected.max() - expected.min()) / 255
    return float((found - expected.abs()).square().mean()) / (step**2 / 12)


def exported(model: QuantizedNetwork, folder: Path) -> list[dict[str, Any]]:
    export(model, inputs(501), folder, split_int8_weights=pairs_saturate(), bf16_attention=True, threads=1)
    return json.loads((folder / "deployed.json").read_text())["attention"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def model() -> QuantizedNetwork:
    return model_of(small_unet(), scales="all")


@pytest.fixture(scope="module")
def rows(model: QuantizedNetwork, folder: Path) -> list[dict[str, Any]]:
    return exported(model, folder)


def test_with_one_key_the_noise_is_the_rounding_of_its_value() -> None:
    q, k, v = (x[:, :1] for x in operands())
    bits = v.numpy().view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)  # to even at ties
    error = np.square(nearest.astype(float) - v.numpy()).mean()
    step = np.ptp(v.numpy().astype(float)) / 255
    assert bf16_noise(q, k, v, "bf16") == pytest.approx(error / (step**2 / 12), rel=1e-4)


@pytest.mark.parametrize("scores", [1.0, 10.0])
@pytest.mark.parametrize(
    ("width", "precision"), [(32, "bf16"), (32, "f32"), (64, "bf16"), (64, "f32"), (40, "f32"), (16, "f32")]
)
def test_the_processor_adds_the_stated_noise(width: int, precision: str, scores: float) -> None:
    if not runtime.bf16_attention_pays():
        pytest.skip("bfloat16 is slow or missing on this processor")
    given = operands(width, scores)
    found = noise_of(executed(given, precision), exact(*given))
    assert found == pytest.approx(bf16_noise(*given[:3], precision), rel=0.02)


def test_float32_is_exact() -> None:
    given = operands()
    expected = exact(*given).abs()
    assert (executed(given, None) - expected).abs().max() < 1e-5 * expected.max()


def test_scores_are_kept_in_float32_where_that_is_needed() -> None:
    shares = {"a": {"bf16": 0.09, "f32": 0.01}, "b": {"bf16": 0.11, "f32": 0.01}, "c": {"bf16": 0.3, "f32": 0.2}}
    noise = {name: AttentionNoise(MIN_SCORES, each) for name, each in shares.items()}
    noise["small"] = AttentionNoise(MIN_SCORES - 1, {"f32": 0.01})
    keys = ("executed", "scores", "noise")
    chosen = {row["attention"]: tuple(row[key] for key in keys) for row in attention_rows(noise, True)}
    assert chosen == {
        "a": ("bf16", "bf16", 0.09),
        "b": ("bf16", "f32", 0.01),
        "c": ("float", None, 0.2),
        "small": ("float", None, 0.01),
    }
    elsewhere = {row["attention"]: (row["executed"], row["scores"]) for row in attention_rows(noise, False)}
    assert elsewhere == {name: ("float", scores) for name, (_, scores, _) in chosen.items()}
    whys = [[row["why"] for row in attention_rows(noise, pays)] for pays in (True, False)]
    loud, slow = "bf16 would add more than 0.1 of the noise of eight bits", "bf16 is not faster on this processor"
    few = "bf16 is not faster with fewer than 262144 scores"
    assert whys == [["", "", loud, few], [slow, slow, loud, few]]


def test_every_attention_with_its_noise_is_in_the_manifest(model: QuantizedNetwork, rows: list[dict[str, Any]]) -> None:
    assert {row["attention"] for row in rows} == set(attentions(model.network))
    assert all(0 < row["noise"] < 1 for row in rows)
    assert {(row["executed"], row["scores"]) for row in rows} == {("float", None)}  # they are small


@pytest.fixture
def half_chosen(tmp_path: Path, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The exported model, with every second attention allowed in bfloat16."""
    manifest = json.loads((folder / "deployed.json").read_text())
    for row in manifest["attention"][::2]:
        row["scores"] = "f32"
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "deployed.json").write_text(json.dumps(manifest))
    return tmp_path


def test_an_opened_model_computes_the_allowed_ones_in_bf16(half_chosen: Path, rows: list[dict[str, Any]]) -> None:
    opened, plain = (ExportedUNet(half_chosen, threads=1, bf16_attention=bf16) for bf16 in (True, False))
    assert opened.bf16 == {row["attention"]: "f32" for row in rows[::2]}
    assert plain.bf16 == {}
    x = inputs(501)["sample"].numpy()
    y, expected = (torch.from_numpy(network(x, 501)).double() for network in (opened, plain))
    assert (y - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize("pays", [True, False])
def test_the_processor_decides_by_itself(half_chosen: Path, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "bf16_attention_pays", lambda: pays)
    assert bool(ExportedUNet(half_chosen, threads=1).bf16) == pays


def test_quantized_operands_stay_in_floating_point(tmp_path: Path) -> None:
    assert exported(model_of(one_level_unet(), scales="all", attention=AttentionBits(8, 8)), tmp_path) == []


def test_masked_attention_is_left_alone() -> None:
    ops = runtime.ops
    q, k, v = (ops.parameter([1, 2, 8, 4], np.float32) for _ in range(3))
    mask = ops.parameter([1, 2, 8, 8], np.float32)
    plain = ops.scaled_dot_product_attention(q, k, v, causal=False)
    masked = ops.scaled_dot_product_attention(plain, k, v, mask, causal=False)
    model: Any = runtime.ov.Model([masked], [q, k, v, mask])  # pyright: ignore[reportGeneralTypeIssues]
    assert list(attention_nodes(model)) == [plain.get_friendly_name()]
