"""Artefacts whose checksum is right and whose content is that of no model are refused by name, at once."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import calibrated, generic, quantizable
from tfmq_exp.quant.ranges import LpSearch
from tfmq_exp.surgery import artifact
from tfmq_exp.surgery.plan import AttentionPlan
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.scales import DynamicScale, IntervalScale, ScalePlan, StaticScale
from tfmq_exp.surgery.temporal_cache import cached

SECONDS = 3.0


class Content(NamedTuple):
    """What is in an artefact."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]

    def site(self) -> dict[str, Any]:
        return self.manifest["plan"]["sites"]["conv_out"]

    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    def scale(self) -> dict[str, Any]:
        return self.site()["input"]["scale"]


Change = Callable[[Content], Any]
SCALE, ZERO = "weights/conv_out/0/scale", "weights/conv_out/0/zero_point"
INPUT, STEPS = (
    "activations/conv_out.input_quantizer",
    "activations/down_blocks.0.resnets.0.time_emb_proj.input_quantizer",
)


def number(key: str, value: float) -> Change:
    """One number of a tensor is another one; the type stays, unless it cannot hold it."""

    def change(content: Content) -> None:
        tensor = content.tensors[key]
        changed = tensor.float().clone() if not 0 <= value <= 255 or value % 1 else tensor.clone()
        changed.view(-1)[0] = value
        content.tensors[key] = changed

    return change


def tensor(key: str, made: Callable[[Tensor], Tensor]) -> Change:
    return lambda content: content.tensors.update({key: made(content.tensors[key])})


def entry(place: str, value: Any) -> Change:
    """What stands at a place of the manifest is another value; `...` removes it. Slashes within keys are written ~."""

    def change(content: Content) -> None:
        *outer, last = (key.replace("~", "/") for key in place.split("/"))
        inner: Any = content.manifest
        for key in outer:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value

    return change


CHANGES: dict[str, Change] = {
    **{
        f"{key} {v}": number(key, v)
        for key in (SCALE, f"{INPUT}/scale", f"{STEPS}/scale")
        for v in (math.nan, math.inf, 0, -1)
    },
    **{f"{ZERO} {v}": number(ZERO, v) for v in (16, 255, -1, 3.5, math.nan, math.inf)},
    **{
        f"{key}/zero_point {v}": number(f"{key}/zero_point", v)
        for key in (INPUT, STEPS)
        for v in (256, -1, 0.5, math.nan)
    },
    **{f"bias {v}": number("float/conv_in.bias", v) for v in (math.nan, -math.inf)},
    **{
        f"{key} as {dtype}": tensor(key, lambda x, dtype=dtype: x.to(dtype))
        for key, dtype in [
            ("weights/conv_out/0/codes", torch.float32),
            ("weights/conv_out/0/codes", torch.int8),
            (SCALE, torch.float64),
            (SCALE, torch.float16),
            (ZERO, torch.int64),
            (f"{INPUT}/scale", torch.float64),
            ("float/conv_in.bias", torch.int32),
            ("float/conv_in.bias", torch.float16),
            ("float/conv_in.bias", torch.complex64),
        ]
    },
    "scale of another shape": tensor(SCALE, lambda x: x[:-1]),
    "scale with more numbers": tensor(SCALE, lambda x: torch.cat([x, x])),
    "activation scale of another shape": tensor(f"{INPUT}/scale", lambda x: x.repeat(2)),
    "codes too few": tensor("weights/conv_out/0/codes", lambda x: x[:-1]),
    **{
        f"bits {b}": entry("plan/sites/conv_out/weight/bits", b)
        for b in (0, -1, 1, 3, 9, 16, 10**9, 2**70, 4.0, "4", None, [4], True)
    },
    **{
        f"scheme {x}": entry("plan/sites/conv_out/weight/scheme", x)
        for x in ("symmetric", "other", None, ["affine"], 3)
    },
    **{f"axis {x}": entry("plan/sites/conv_out/weight/axis", x) for x in (None, 1, -1, 7, True, "0", 0.0)},
    **{
        f"input bits {b}": entry("plan/sites/conv_out/input/specs", [{"bits": b, "scheme": "affine", "axis": None}])
        for b in (0, 99, "8")
    },
    **{f"specs {x}": entry("plan/sites/conv_out/input/specs", x) for x in ([], {}, None, "x", [3], [[]], 10**9)},
    **{f"split {x}": entry("plan/sites/conv_out/split", x) for x in (0, 1, -1, 10**9, "1", [1], 0.5)},
    **{
        f"scale kind {x}": entry("plan/sites/conv_out/input/scale/kind", x)
        for x in ("other", None, 3, [], {}, "dynamic", "intervals", "per_step")
    },
    "scale with an unknown key": entry("plan/sites/conv_out/input/scale/novelty", 1),
    "spec with an unknown key": entry("plan/sites/conv_out/weight/novelty", 1),
    "site with an unknown key": entry("plan/sites/conv_out/novelty", 1),
    "plan with an unknown key": entry("plan/novelty", 1),
    "manifest with an unknown key": entry("novelty", 1),
    "configuration with an unknown key": entry("config/novelty", 1),
    "configuration with a private key": entry("config/_attn_implementation", "x/y"),
    "heads of something unknown": entry("heads/novelty", 1),
    "shape of something unknown": entry("shapes/novelty", [1]),
    "site that is unknown": lambda c: c.manifest["plan"]["sites"].update(novelty=c.site()),
    "site that is no layer": lambda c: c.manifest["plan"]["sites"].update(mid_block=c.site()),
    "site that is the network": lambda c: c.manifest["plan"]["sites"].update({"": c.site()}),
    "operands of something unknown": lambda c: c.manifest["plan"]["operands"].update(novelty={}),
    "site removed": entry("plan/sites/conv_out", ...),
    **{
        f"without {place}": entry(place, ...)
        for place in [
            *(
                "network",
                "config",
                "plan",
                "shapes",
                "cached",
                "unneeded",
                "heads",
                "recipe",
                "plan/sites",
                "plan/operands",
            ),
            *(
                "plan/timesteps",
                "plan/sites/conv_out/weight",
                "plan/sites/conv_out/weight/bits",
                "shapes/weights~conv_out~0",
            ),
            *("plan/sites/conv_out/weight/axis", "plan/sites/conv_out/input", "plan/sites/conv_out/input/specs"),
            *("plan/sites/conv_out/input/scale", "plan/sites/conv_out/input/scale/kind", "plan/sites/conv_out/split"),
            *("config/block_out_channels", "config/norm_num_groups", "config/freq_shift", "config/layers_per_block"),
        ]
    },
    **{
        f"{place} as {value!r}": entry(place, value)
        for place in (
            "network",
            "config",
            "plan",
            "shapes",
            "cached",
            "unneeded",
            "heads",
            "plan/sites",
            "plan/operands",
            "plan/timesteps",
        )
        for value in (None, "text", [1], {"a": 1})
    },
    **{f"sites {v!r}": entry("plan/sites/conv_out", v) for v in (None, 3, "text", [], {})},
    **{
        f"timesteps {t}": entry("plan/timesteps", t)
        for t in (
            [],
            [-1],
            [1, 1],
            [751, 501, 251, -1],
            [751.0, 501, 251, 1],
            [751, 501, 251, "1"],
            [2**62, 3, 2, 1],
            [True, 3, 2, 5],
            [1, 2, 3],
            [None],
        )
    },
    **{f"timesteps of a layer more {k}": lambda c, k=k: c.manifest["plan"]["timesteps"].append(k) for k in (0, 751)},
    **{
        f"shape {x}": entry("shapes/weights~conv_out~0", x)
        for x in ([], [-3, 16, 3, 3], [2**62, 4], [16, 3, 3, 3], [3, 16, 9], "x", None, [3.0, 16, 3, 3])
    },
    **{
        f"config {key}={value}": entry(f"config/{key}", value)
        for key, value in [
            *(("layers_per_block", x) for x in (0, -1, 2, 10**9, 2**80, 1e9, "1", None, [1, 1])),
            *(
                ("block_out_channels", x)
                for x in ([], [16], [16, 2**40], [2**62, 2**62], [0, 0], [-16, 32], ["16", 32], 16, [16] * 10**5)
            ),
            *(("norm_num_groups", x) for x in (0, -8, 7, 10**9, "8")),
            *(("in_channels", x) for x in (0, -3, 2**40, "3", 4)),
            *(
                ("down_block_types", x)
                for x in ([], ["DownBlock2D"], ["os.system", "x"], 3, ["CrossAttnDownBlock2D", "DownBlock2D"])
            ),
            *(("act_fn", x) for x in ("novelty", None, 3)),
            *(("attention_head_dim", x) for x in (0, -1, "16", 10**9)),
            *(("norm_eps", x) for x in ("x", math.nan, None)),
            *(("time_embedding_type", x) for x in ("novelty", "fourier", 3)),
            *(("center_input_sample", x) for x in ("yes", 1)),
            ("sample_size", [[8]]),
        ]
    },
    **{
        f"heads {x}": lambda c, x=x: c.manifest["heads"].update({next(iter(c.manifest["heads"])): x})
        for x in (0, -1, 3, 10**9, "2", 2.0, None, True)
    },
    **{f"recipe {x}": entry("recipe", x) for x in (3, "text", [], {}, {"sampler": "DDIM"}, {"sampler": "os.system"})},
    "heads missing": lambda c: c.manifest["heads"].popitem(),
    **{
        f"cached {x}": entry("cached", x)
        for x in ({"conv_out": {"bits": 8, "scheme": "affine", "axis": 0}}, {"novelty": {}}, {"": {}})
    },
    **{
        f"unneeded {x}": entry("unneeded", x)
        for x in (["conv_out"], ["novelty"], [""], ["time_embedding.linear_1"], [3], [None])
    },
    **{f"outside {x}": entry("outside", x) for x in (["weights/conv_out/0"], [], "weights", None, [3], {"a": 1})},
    "tensor missing": lambda c: c.tensors.pop("float/conv_in.bias"),
    "tensor more": lambda c: c.tensors.update(novelty=torch.zeros(1)),
    "empty": lambda c: c.tensors.clear(),
}


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
    artifact.save(calibrated(quantizable(small_unet, attention=AttentionPlan(8, 16))), path)
    return Content(*artifact.read(path))


def write(content: Content, path: Path) -> Path:
    """An artefact whose checksum is right."""
    text = json.dumps(content.manifest, sort_keys=True)
    header = {"format": artifact.FORMAT, "version": artifact.VERSION, "manifest": content.manifest}
    header["sha256"] = artifact.checksum(text, content.tensors)
    save_file(content.tensors, path, {"header": json.dumps(header, sort_keys=True)})
    return path


def changed(content: Content, change: Change, path: Path) -> Path:
    copy = Content(json.loads(json.dumps(content.manifest)), dict(content.tensors))
    change(copy)
    return write(copy, path)


def refusal(path: Path) -> str:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"\S") as caught:
        artifact.load(path)
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
    artifact.load(changed(content, lambda _: None, tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "scale",
    [
        {"kind": "statistics", "encoding": None, "hidden": [10**5, 10**5]},
        {"kind": "statistics", "encoding": None, "hidden": [10**12]},
        {"kind": "statistics", "encoding": None, "hidden": [0]},
        {"kind": "statistics", "encoding": None, "hidden": ["8"]},
        {"kind": "statistics", "encoding": None, "hidden": 8},
        {"kind": "statistics", "encoding": {"kind": "frequency", "width": 2 * 10**9}, "hidden": [4]},
        {"kind": "statistics", "encoding": {"kind": "normalised"}, "hidden": [4]},
        {"kind": "statistics", "encoding": {"kind": "novelty"}, "hidden": [4]},
        {"kind": "statistics", "encoding": {"kind": []}, "hidden": [4]},
        {"kind": "intervals", "count": 0, "train_timesteps": 1000},
        {"kind": "intervals", "count": "2", "train_timesteps": 1000},
        {"kind": "intervals", "count": 2, "train_timesteps": 0},
        {"kind": "dynamic", "per": "novelty"},
        {
            "kind": "trained",
            "form": {"kind": "novelty", "levels": "full"},
            "scale": {"kind": "static"},
            "centre": "zero",
        },
        {"kind": "trained", "form": {"kind": "lsq", "levels": 3}, "scale": {"kind": "static"}, "centre": "zero"},
        {"kind": "trained", "form": {"kind": "lsq", "levels": "full"}, "scale": {"kind": "static"}, "centre": 0},
        {"kind": "trained", "form": {"kind": "lsq", "levels": "full"}, "scale": None, "centre": "zero"},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_scales_that_are_none(scale: dict[str, Any], scheme: str, content: Content, tmp_path: Path) -> None:
    def change(copy: Content) -> None:
        copy.site()["input"] = {"specs": [{"bits": 8, "scheme": scheme, "axis": None}], "scale": scale}

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
        "site with an unknown key": "plan.sites.conv_out.novelty is unknown",
        "configuration with an unknown key": "config.novelty is unknown",
        "manifest with an unknown key": "unknown entry 'novelty'",
        "without heads": "lacks 'heads'",
        "without config/freq_shift": "config.freq_shift is missing",
        "config layers_per_block=1000000000": "1000000000 layers",
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


def with_features(unet: nn.Module, temporal: Any, rest: Any, store: bool = False, widen: bool = True) -> QuantizedUNet:
    """A model with one more of the things that a manifest can say."""
    model = quantizable(unet, scales=ScalePlan(temporal, rest))
    if not widen:
        weight = model.unet.conv_out.weight
        weight.data = weight.abs() + 1  # ranges that do not contain zero
        model.unet.conv_out.weight_quantizer.estimator = LpSearch(widen=False)
    model = calibrated(model)
    if store:
        for site in [name for name in model.plan.sites if name.endswith("time_emb_proj")]:
            width = model.unet.get_submodule(site).out_features
            model.cache_feature(site, cached(torch.randn(model.clock.num_steps, width), 8))
        for site in ("time_embedding.linear_1", "time_embedding.linear_2"):
            model.drop(site)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"temporal": StaticScale(), "rest": StaticScale(), "store": True},
        {"temporal": StaticScale(), "rest": StaticScale(), "widen": False},
        {"temporal": IntervalScale(2, 1000), "rest": DynamicScale("sample")},
    ],
    ids=["stored features", "ranges without zero", "intervals and dynamic"],
)
def test_what_models_are_like_is_read(options: dict[str, Any], tiny_unet: nn.Module, tmp_path: Path) -> None:
    model = with_features(tiny_unet, **options)
    artifact.save(model, tmp_path / "a.safetensors")
    loaded = artifact.load(tmp_path / "a.safetensors")
    artifact.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x, torch.tensor(251)).sample, model(x, torch.tensor(251)).sample)


def test_stored_features_that_are_needed_are_refused(tiny_unet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(with_features(tiny_unet, StaticScale(), StaticScale(), store=True), path)
    stored = Content(*artifact.read(path))
    site = next(iter(stored.manifest["cached"]))
    changes: dict[str, Change] = {
        "steps": lambda c: c.manifest["plan"]["timesteps"].pop(),
        "bits": entry(f"cached/{site}", {"bits": 16, "scheme": "affine", "axis": 0}),
        "axis": entry(f"cached/{site}", {"bits": 8, "scheme": "affine", "axis": 1}),
        "unneeded again": lambda c: c.manifest["unneeded"].append("time_embedding.linear_1"),
        "needed": lambda c: c.manifest["unneeded"].pop(),
        "scale": number(f"cached/{site}/scale", -1),
        "zero point": number(f"cached/{site}/zero_point", 300),
        "outside": entry("outside", [f"cached/{site}"]),
    }
    for change in changes.values():
        refusal(changed(stored, change, tmp_path / "b.safetensors"))


def test_ranges_without_zero_are_said(tiny_unet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(with_features(tiny_unet, StaticScale(), StaticScale(), widen=False), path)
    stored = Content(*artifact.read(path))
    assert stored.manifest["outside"] == ["weights/conv_out/0"]
    assert "must lie within the grid" in refusal(changed(stored, entry("outside", ...), tmp_path / "b.safetensors"))
