"""Artefacts whose checksum is right and whose content is that of no model are refused by name, at once."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.conftest import calibrated, generic, quantizable
from tests.helpers.sampling import SCHEDULE
from tests.helpers.stored_features import conditions_of, quantized
from tests.helpers.transformers import read_stored
from tests.unit.surgery.changes import CHANGES, INPUT, SCALE, ZERO, Change, Content, entry, number, tensor
from tfmq_exp.methods.temporal_features import BasisFeatures, FeatureInputs
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.observed_ranges import StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.stored_features import CachedFeature, cached
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

pytestmark = pytest.mark.bad_input

SECONDS = 3.0


@pytest.fixture(scope="module")
def small_unet() -> nn.Module:
    return generic(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
            norm_num_groups=8,
            attention_head_dim=16,
        )
    )


@pytest.fixture(scope="module")
def content(small_unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Content:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    serialization.save(calibrated(quantizable(small_unet, attention=AttentionBits(8, 16))), path)
    return Content(*serialization.read(path))


def write(content: Content, path: Path) -> Path:
    """An artefact whose checksum is right."""
    text = json.dumps(content.manifest, sort_keys=True)
    header = {"format": serialization.FORMAT, "version": serialization.VERSION, "manifest": content.manifest}
    header["sha256"] = serialization.checksum(text, content.tensors)
    save_file(content.tensors, path, {"header": json.dumps(header, sort_keys=True)})
    return path


def changed(content: Content, change: Change, path: Path) -> Path:
    copy = Content(json.loads(json.dumps(content.manifest)), dict(content.tensors))
    change(copy)
    return write(copy, path)


def refusal(path: Path) -> str:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"\S") as caught:
        serialization.load(path)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_model_is_like_is_refused(name: str, content: Content, tmp_path: Path) -> None:
    refusal(changed(content, CHANGES[name], tmp_path / "model.safetensors"))


def test_without_a_change_it_is_read(content: Content, tmp_path: Path) -> None:
    serialization.load(changed(content, lambda _: None, tmp_path / "model.safetensors"))


GENERATOR: dict[str, Any] = {"kind": "dynamic_generator", "encoding": None, "hidden_dims": [4]}
STATIC = {"scale": {"kind": "static"}}


@pytest.mark.parametrize(
    "quantizer",
    [
        *({"scale": GENERATOR | {"hidden_dims": dims}} for dims in ([10**5, 10**5], [10**12], [0], ["8"], 8)),
        *(
            {"scale": GENERATOR | {"encoding": encoding}}
            for encoding in (
                {"kind": "frequency", "width": 2 * 10**9},
                *({"kind": "normalised"}, {"kind": "novelty"}, {"kind": []}, {"kind": "static"}),
            )
        ),
        {"scale": {"kind": "timestep_groups", "count": 0, "train_timesteps": 1000}},
        {"scale": {"kind": "timestep_groups", "count": "2", "train_timesteps": 1000}},
        {"scale": {"kind": "timestep_groups", "count": 2, "train_timesteps": 0}},
        {"scale": {"kind": "dynamic", "granularity": "novelty"}},
        {"scale": {"kind": "dynamic", "granularity": "sample", "int_range": "novelty"}},
        {**STATIC, "fn": {"kind": "novelty"}},
        {**STATIC, "fn": {"kind": "lsq", "int_range": 3}},
        {**STATIC, "fn": {"kind": "lsq"}, "offset": 0},
        {**STATIC, "fn": {"kind": "static"}},
        {"scale": None, "fn": {"kind": "lsq"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_quantizers_that_are_none(quantizer: dict[str, Any], scheme: str, content: Content, tmp_path: Path) -> None:
    def change(copy: Content) -> None:
        spec = {"bits": 8} if scheme == "affine" else {"bits": 8, "scheme": scheme}
        copy.layer()["input"] = {"specs": [spec], **quantizer}

    refusal(changed(content, change, tmp_path / "model.safetensors"))


def test_unknown_operands_are_refused(content: Content, tmp_path: Path) -> None:
    """Even where their tensors are there."""

    def change(copy: Content) -> None:
        name, parts = next(iter(copy.manifest["plan"]["operands"].items()))
        parts["novelty"] = parts["key"]
        stem = f"activations/{name}.processor"
        known = [key for key in copy.tensors if key.startswith(stem) and ".key/" in key]
        copy.tensors.update({key.replace(".key/", ".novelty/"): copy.tensors[key].clone() for key in known})
        assert known

    assert "unknown operand 'novelty'" in refusal(changed(content, change, tmp_path / "model.safetensors"))


def test_messages_name_the_entry(content: Content, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for name, words in {
        f"{SCALE} nan": f"'{SCALE}' has numbers that are not finite",
        f"{SCALE} -1": f"'{SCALE}' must be positive, got -1",
        f"{ZERO} 16": f"'{ZERO}' must lie within the grid 0 .. 15, got",
        f"{ZERO} 3.5": f"'{ZERO}' must be integers",
        f"{INPUT}/zero_point 256": f"'{INPUT}/zero_point' must lie within the grid 0 .. 255",
        "weights/conv_out/0/codes as torch.float32": "'weights/conv_out/0/codes' must be torch.uint8, got torch.float32",
        "bias nan": "'float/conv_in.bias' has numbers that are not finite",
        "site with an unknown key": "plan.layers.conv_out.novelty is unknown",
        "configuration with an unknown key": "config.novelty is unknown",
        "manifest with an unknown key": "unknown entry 'novelty'",
        "without heads": "lacks 'heads'",
        "without config/freq_shift": "config.freq_shift is missing",
        "config layers_per_block=1000000000": "layers_per_block=1000000000 cannot be",
        "timesteps []": "'plan.timesteps' must be different integers",
        "unneeded ['conv_out']": "'conv_out' is needed",
        "heads 3": "must divide 32, got 3",
    }.items():
        assert words in refusal(changed(content, CHANGES[name], path)), name


@pytest.mark.parametrize(
    "header", ["[]", "3", "null", '"x"', "{", "[" * 100_000, '{"format": []}', "9" * 5000, '{"version": 2}']
)
def test_headers_that_are_none(header: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"header": header})
    refusal(tmp_path / "model.safetensors")


def test_unknown_entries_of_the_header_are_named(content: Content, tmp_path: Path) -> None:
    path = write(content, tmp_path / "model.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    save_file(content.tensors, path, {"header": json.dumps(header | {"novelty": 1})})
    assert "unknown entry 'novelty' in its header" in refusal(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "quantized.safetensors"
    for text, words in (
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<html>", "web page"),
        ("", "empty"),
    ):
        path.write_text(text)
        assert words in refusal(path)
    assert "is a folder" in refusal(tmp_path)


def with_features(
    network: nn.Module, temporal: Any, default: Any, store: bool = False, include_zero: bool = True
) -> QuantizedNetwork:
    """A model with one more of the things that a manifest can say."""
    model = quantizable(network, scales=ScalePlan(temporal, default))
    if not include_zero:
        weight = model.network.conv_out.weight
        weight.data = weight.abs() + 1  # ranges that do not contain zero
        model.network.conv_out.weight_quantizer.observer = LpObserver(include_zero=False)
    model = calibrated(model)
    if store:
        for layer in [name for name in model.plan.layers if name.endswith("time_emb_proj")]:
            width = model.network.get_submodule(layer).out_features
            table = cached(torch.randn(model.context.num_steps, width), 8)
            model.replace_layer(layer, CachedFeature(table, model.context))
        for layer in ("time_embedding.linear_1", "time_embedding.linear_2"):
            model.replace_layer(layer, None)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"temporal": StaticConfig(), "default": StaticConfig(), "store": True},
        {"temporal": StaticConfig(), "default": StaticConfig(), "include_zero": False},
        {"temporal": TimestepGroupConfig(2, 1000), "default": DynamicConfig("sample")},
    ],
    ids=["stored features", "ranges without zero", "intervals and dynamic"],
)
def test_what_models_are_like_is_read(options: dict[str, Any], tiny_unet: nn.Module, tmp_path: Path) -> None:
    model = with_features(tiny_unet, **options)
    serialization.save(model, tmp_path / "a.safetensors")
    loaded = serialization.load(tmp_path / "a.safetensors")
    serialization.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x, torch.tensor(251)).sample, model(x, torch.tensor(251)).sample)


def test_stored_features_that_are_needed_are_refused(tiny_unet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    serialization.save(with_features(tiny_unet, StaticConfig(), StaticConfig(), store=True), path)
    stored = Content(*serialization.read(path))
    layer = next(iter(stored.manifest["cached"]))
    changes: dict[str, Change] = {
        "steps": lambda c: c.manifest["plan"]["timesteps"].pop(),
        "bits": entry(f"cached/{layer}", {"bits": 16, "scheme": "affine", "axis": 0}),
        "axis": entry(f"cached/{layer}", {"bits": 8, "scheme": "affine", "axis": 1}),
        "unneeded again": lambda c: c.manifest["unneeded"].append("time_embedding.linear_1"),
        "needed": lambda c: c.manifest["unneeded"].pop(),
        "scale": number(f"cached/{layer}/scale", -1),
        "zero point": number(f"cached/{layer}/zero_point", 300),
        "outside": entry("outside", [f"cached/{layer}"]),
    }
    for change in changes.values():
        refusal(changed(stored, change, tmp_path / "b.safetensors"))


def test_ranges_without_zero_are_said(tiny_unet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    serialization.save(with_features(tiny_unet, StaticConfig(), StaticConfig(), include_zero=False), path)
    stored = Content(*serialization.read(path))
    assert stored.manifest["outside"] == ["weights/conv_out/0"]
    assert "must lie within the grid" in refusal(changed(stored, entry("outside", ...), tmp_path / "b.safetensors"))


def test_a_recipe_that_contradicts_the_network_is_refused(tiny_unet: nn.Module, tmp_path: Path) -> None:
    """Timesteps in another order would give every step the scales of another one."""
    path, recipe = tmp_path / "a.safetensors", Recipe(Sampling(DDIM(4)), SCHEDULE, (3, 8, 8))
    serialization.save(calibrated(quantizable(tiny_unet)), path, recipe)
    stored = Content(*serialization.read(path))
    serialization.load_with_recipe(path)
    cases: dict[str, Change] = {
        "'plan.timesteps' must be those of its sampler, in its order: 751": lambda c: c.manifest["plan"][
            "timesteps"
        ].reverse(),
        "'plan.timesteps' must be those of its sampler": entry("plan/timesteps", [750, 501, 251, 1]),
        "the network's 3 channels, got \\[4, 8, 8\\]": entry("recipe/shape", [4, 8, 8]),
        r"sides that \d divides, got 7": entry("recipe/shape", [3, 8, 7]),
    }
    for message, change in cases.items():
        assert re.search(message, refusal(changed(stored, change, tmp_path / "b.safetensors"))), message


def test_features_by_condition_and_bases_that_are_none(tmp_path: Path) -> None:
    stored = read_stored("dit")
    model = quantized(stored)
    BasisFeatures(8, "always", rank=2)(model, stored.network, stored.structure(), FeatureInputs(conditions_of(stored)))
    path = tmp_path / "a.safetensors"
    serialization.save(model, path)
    content = Content(*serialization.read(path))
    layer = next(iter(content.manifest["bases"]))
    count = len(content.tensors["conditions/class_labels"])
    changes: dict[str, Change] = {
        "must ascend": tensor(f"float/{layer}.timesteps", lambda x: x.flip(0)),
        "has coefficients": entry(f"bases/{layer}/coefficients", [3, count, 3]),
        "'cached/.*/codes' must|cannot hold|a basis of": entry(f"bases/{layer}/coefficients", [3, count + 1, 2]),
        "the table of .* must have": entry(f"bases/{layer}", ...),
        "conditions.class_labels must be a dtype": entry("conditions/class_labels", ["os.system", count]),
        "conditions.class_labels must be": entry("conditions/class_labels", ["torch.int64", 10**12]),
        "conditions/class_labels": tensor("conditions/class_labels", lambda x: x[:1]),
        "replaced_weights": entry("replaced_weights", 0),
        "is needed": lambda c: c.manifest["unneeded"].append("pos_embed.proj"),
        "within the grid": number(f"cached/{layer}/zero_point", 300),
    }
    for message, change in changes.items():
        assert re.search(message, refusal(changed(content, change, tmp_path / "b.safetensors"))), message
