"""What a folder's configurations may not say, by its key, before weights are read."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from tfmq_exp.denoisers.loading.condition_encoders import TextEncoder
from tfmq_exp.denoisers.loading.pretrained import load_denoiser

pytestmark = pytest.mark.bad_input

KERNELS = "kernels-community/flash-attn2"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of text, and beside it a UNet of images."""
    folder = tmp_path_factory.mktemp("stored")
    shared: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    attention: dict[str, Any] = {"attention_head_dim": 2, "cross_attention_dim": 12}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            **shared,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **attention,
        ).save_pretrained(folder / "text/unet")
        UNet2DModel(
            **shared,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).save_pretrained(folder / "plain/unet")
        AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(
            folder / "text/vae"
        )
        config = CLIPTextConfig(
            vocab_size=120,
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=98,
        )
        CLIPTextModel(config).save_pretrained(folder / "text/text_encoder")
    for name in ("text", "plain"):
        DDIMScheduler().save_pretrained(folder / name / "scheduler")
    return folder


@pytest.fixture
def pipeline(stored: Path, tokenizer: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored / "text", tmp_path / "model")
    shutil.copytree(tokenizer, tmp_path / "model/tokenizer")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def refusal(folder: Path) -> str:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_denoiser("x", folder, None, False)
    assert time.perf_counter() - began < 5
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_pipeline_itself_loads(pipeline: Path, stored: Path) -> None:
    edit(pipeline / "unet/config.json", _commit_hash=None, auto_map=None, _name_or_path="elsewhere")
    assert isinstance(load_denoiser("x", pipeline, None, False).encoder, TextEncoder)
    load_denoiser("x", stored / "plain", None, False)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation", KERNELS),
        ("_attn_implementation_internal", KERNELS),
        ("attn_implementation", KERNELS),
        ("_experts_implementation", "x"),
        ("auto_map", {"AutoModel": "modeling.Evil"}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("_commit", 1),
    ],
)
def test_nothing_names_code(part: str, key: str, value: Any, pipeline: Path) -> None:
    edit(pipeline / part / "config.json", **{key: value})
    assert f"config.json: {key}=" in refusal(pipeline)


def test_adapters_are_not_passed_over(pipeline: Path) -> None:
    (pipeline / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    assert "adapter_config.json: adapters are not supported" in refusal(pipeline)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "layers_per_block", 10**9),
        ("unet", "layers_per_block", 1e9),
        ("unet", "layers_per_block", [10**9, 1]),
        ("unet", "layers_per_block", float("inf")),
        ("unet", "layers_per_block", 600),
        ("unet", "transformer_layers_per_block", 10**9),
        ("unet", "block_out_channels", [16, 10**12]),
        ("unet", "cross_attention_dim", 10**12),
        ("unet", "in_channels", 10**10),
        ("unet", "sample_size", 10**9),
        ("unet", "sample_size", [8, 10**6]),
        ("unet", "down_block_types", ["DownBlock2D"] * 1000),
        ("unet", "norm_eps", float("nan")),
        ("vae", "layers_per_block", 10**9),
        ("vae", "latent_channels", 10**10),
        ("text_encoder", "vocab_size", 10**12),
        ("text_encoder", "hidden_size", 10**9),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "max_position_embeddings", 10**12),
        ("text_encoder", "intermediate_size", 10**15),
    ],
    ids=str,
)
def test_sizes_that_cannot_be(part: str, key: str, value: Any, pipeline: Path) -> None:
    edit(pipeline / part / "config.json", **{key: value})
    assert key in refusal(pipeline)


def test_widths_that_only_together_are_too_large(pipeline: Path) -> None:
    edit(pipeline / "text_encoder/config.json", hidden_size=500_000, intermediate_size=600_000)
    message = refusal(pipeline)
    assert "the largest setting is intermediate_size=600000" in message
    assert "their files have" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_cross_attention", True),
        ("time_cond_proj_dim", 8),
        ("resnet_time_scale_shift", "ada_group"),
        ("attention_type", "gated"),
        ("time_embedding_type", "rotary"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim", 12),
        ("encoder_hid_dim_type", "text_proj"),
        ("class_embeddings_concat", True),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["KDownBlock2D", "KCrossAttnDownBlock2D"]),
        ("up_block_types", ["SimpleCrossAttnUpBlock2D", "UpBlock2D"]),
    ],
    ids=str,
)
def test_settings_of_other_networks(key: str, value: Any, pipeline: Path) -> None:
    edit(pipeline / "unet/config.json", **{key: value})
    assert f"unet/config.json: a UNet with {key}=" in refusal(pipeline)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "in_channels=9, out_channels=4: more channels than the 4 of the noisy sample (inpainting"),
        ({"in_channels": 8}, "in_channels=8, out_channels=4"),
        ({"out_channels": 5}, "in_channels=4, out_channels=5: expected out_channels=4, or 8 with a learned variance"),
        ({"sample_size": None}, "sample_size must be a whole number"),
        ({"sample_size": [8, 8, 8]}, "sample_size must be"),
        ({"sample_size": 0}, "sample_size must be"),
        ({"sample_size": "8"}, "sample_size must be"),
        ({"sample_size": True}, "sample_size must be"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"act_fn": "softplus"}, "activation function softplus"),
        ({"norm_num_groups": 5}, "num_channels (16) must be divisible by num_groups (5)"),
        ({"new_setting": 3}, "UNet2DConditionModel has no setting 'new_setting' (=3)"),
        ({"_class_name": ["a"]}, "holds a network of class ['a']"),
        ({"block_out_channels": [16, -32]}, "block_out_channels=[16, -32] cannot be: expected numbers from 0"),
        ({"layers_per_block": "1"}, "no UNet2DConditionModel can be built"),
    ],
    ids=str,
)
def test_settings_of_a_unet_that_cannot_be(changes: dict[str, Any], message: str, pipeline: Path) -> None:
    edit(pipeline / "unet/config.json", **changes)
    assert message in refusal(pipeline)


def test_a_first_stage_of_other_latents(pipeline: Path) -> None:
    edit(pipeline / "vae/config.json", latents_mean=[0.1] * 4)
    assert "a first stage with latents_mean=[0.1, 0.1, 0.1, 0.1] is not supported" in refusal(pipeline)
    with torch.random.fork_rng():
        vae = AutoencoderKL(latent_channels=6, norm_num_groups=4, block_out_channels=(8,))
    vae.save_pretrained(pipeline / "vae")
    assert "in_channels=4, and the first stage decodes latents of 6 channels" in refusal(pipeline)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_first_stage_of_no_images(pipeline: Path, channels: int) -> None:
    with torch.random.fork_rng():
        vae = AutoencoderKL(latent_channels=4, out_channels=channels, norm_num_groups=4, block_out_channels=(8,))
    vae.save_pretrained(pipeline / "vae")
    assert f"a first stage with out_channels={channels} is not supported; expected 1, 3" in refusal(pipeline)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("controlnet", "ControlNetModel"),
        ("adapter", "T2IAdapter"),
        ("text_encoder_2", "CLIPTextModelWithProjection"),
        ("motion_adapter", "MotionAdapter"),
    ],
)
def test_components_that_are_not_read(name: str, kind: str, pipeline: Path) -> None:
    harmless = {"safety_checker": [None, None], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index = {"_class_name": "SomePipeline", "requires_safety_checker": True, "unet": ["diffusers", "A"], **harmless}
    (pipeline / "model_index.json").write_text(json.dumps(index | {name: [None, None]}))
    load_denoiser("x", pipeline, None, False)
    (pipeline / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", kind]}))
    assert f"model_index.json: {name} ({kind}) of a SomePipeline is not supported" in refusal(pipeline)
