"""What a folder's configurations of text models and tokenizers may not say."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.originals import word
from tests.unit.denoisers.loading.test_network_config import edit, pipeline, refusal, stored  # noqa: F401 - fixtures
from tfmq_exp.denoisers.loading.condition_encoders import read_tokenizer
from tfmq_exp.denoisers.loading.pretrained import load_denoiser

pytestmark = pytest.mark.bad_input


def test_text_models_that_hide_words_from_the_unet(pipeline: Path) -> None:
    edit(pipeline / "text_encoder/config.json", use_attention_mask=True)
    assert "a text model with use_attention_mask=True is not supported" in refusal(pipeline)


def test_an_odd_size(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "plain", tmp_path / "model")
    edit(tmp_path / "model/unet/config.json", sample_size=7)
    assert "sample_size=7 is no multiple of 2" in refusal(tmp_path / "model")
    edit(tmp_path / "model/unet/config.json", sample_size=[6, 10])
    assert load_denoiser("x", tmp_path / "model", None, False).sample_shape == (3, 6, 10)


def test_text_models_that_give_no_numbers(pipeline: Path) -> None:
    file = pipeline / "text_encoder/model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("final_layer_norm.bias"))
    save_file(state | {name: torch.full_like(state[name], float("inf"))}, file, {"format": "pt"})
    assert "not finite" in refusal(pipeline)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoTokenizer": ["tok.Evil", None]}),
        ("tokenizer_class", "LlamaTokenizer"),
        ("tokenizer_class", ["a"]),
        ("tokenizer_file", "/etc/passwd"),
        ("vocab_file", "../vocab.json"),
        ("init_inputs", ["x"]),
    ],
    ids=str,
)
def test_tokenizers_name_neither_code_nor_files(key: str, value: Any, tokenizer: Path) -> None:
    edit(tokenizer / "tokenizer_config.json", **{key: value})
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {key}="):
        read_tokenizer(tokenizer)


@pytest.mark.parametrize("length", [0, 1, 2, -1, 7.5, float("nan"), float("inf"), "77", True, [77]], ids=str)
def test_lengths_of_captions_that_cannot_be(length: Any, tokenizer: Path) -> None:
    edit(tokenizer / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: model_max_length must be a whole number, at least 3"
    ):
        read_tokenizer(tokenizer)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_settings_of_a_tokenizer_that_are_something_else(name: str, tokenizer: Path) -> None:
    (tokenizer / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS"):
        read_tokenizer(tokenizer)


def test_captions_are_cut_where_the_tokenizer_says(pipeline: Path) -> None:
    """As diffusers' pipelines do; counted once for each that is different."""
    captions = [" ".join([word(5)] * count) for count in (3, 6, 7, 7, 100)]
    whole: Any = load_denoiser("x", pipeline, None, False)
    assert whole.encoder.tokens(captions).shape == (5, 77)
    assert whole.encoder.count_cut(captions) == {"different": 4, "cut": 1, "tokens": 77}
    assert whole.encoder.count_cut([]) == {"different": 0, "cut": 0, "tokens": 77}
    edit(pipeline / "tokenizer/tokenizer_config.json", tokenizer_class="CLIPTokenizer", model_max_length=8)
    short: Any = load_denoiser("x", pipeline, None, False)
    assert short.encoder.tokens(captions).shape == (5, 8)
    assert short.encoder.count_cut(captions) == {"different": 4, "cut": 2, "tokens": 8}
    assert short.settings["tokenizer_sha256"] != whole.settings["tokenizer_sha256"]
