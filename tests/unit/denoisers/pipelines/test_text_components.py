"""Text encoders and tokenizers of pipelines: what transformers' own reader gives, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from tests.helpers.pipelines import GOLDENS, copied, edit
from tfmq_exp.denoisers.pipelines.text_components import (
    TEXT_ENCODERS,
    TOKENIZERS,
    load_text_encoder,
    load_tokenizer,
)

ENCODERS = {
    "flux/text_encoder": "CLIPTextModel",
    "flux/text_encoder_2": "T5EncoderModel",
    "sd3/text_encoder_2": "CLIPTextModelWithProjection",
    "wan/text_encoder": "UMT5EncoderModel",
    "lumina2/text_encoder": "Gemma2Model",
}


@pytest.mark.parametrize("place", ENCODERS)
def test_encoders_are_those_of_transformers_own_reader(place: str) -> None:
    ours = load_text_encoder(GOLDENS / place, ENCODERS[place])
    expected = getattr(transformers, ENCODERS[place]).from_pretrained(GOLDENS / place, local_files_only=True)
    ids = torch.tensor([[3, 5, 4, 1]])
    with torch.no_grad():
        assert torch.equal(ours(ids)[0], expected(ids)[0])
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_names_of_older_versions_are_read(tmp_path: Path) -> None:
    """Version 4 of transformers wrote a level more, and the numbers of positions."""
    folder = copied("flux", tmp_path) / "text_encoder"
    state = {f"text_model.{name}": value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / "model.safetensors")
    ours, expected = (
        load_text_encoder(place / "text_encoder", "CLIPTextModel") for place in (folder.parent, GOLDENS / "flux")
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))


def test_bars_are_shown_to_others_as_before() -> None:
    shown = logging.is_progress_bar_enabled()
    load_text_encoder(GOLDENS / "flux/text_encoder", "CLIPTextModel")
    assert logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize(
    ("place", "name"), [("flux/tokenizer", "CLIPTokenizer"), ("flux/tokenizer_2", "T5TokenizerFast")]
)
def test_tokenizers_are_those_of_transformers_own_reader(place: str, name: str) -> None:
    expected = getattr(transformers, name).from_pretrained(GOLDENS / place, local_files_only=True)
    found = load_tokenizer(GOLDENS / place, name)
    assert found("photo of a red cat")["input_ids"] == expected("photo of a red cat")["input_ids"]


def test_the_lists_name_classes_of_the_installed_transformers() -> None:
    for name in (*TEXT_ENCODERS, *TOKENIZERS):
        assert isinstance(getattr(transformers, name), type), name


def setting(file: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, lambda config: config.update(changes))


def weights(**changes: torch.Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
        save_file({**state, **changes}, folder / "model.safetensors")

    return damage


def lacking(folder: Path) -> None:
    state = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    state.pop("final_layer_norm.weight")
    save_file(state, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "auto_map": (setting(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "kernels from elsewhere": (setting(attn_implementation="someone/kernel"), "attn_implementation"),
    "hidden kernels": (setting(_attn_implementation="someone/kernel"), "_attn_implementation"),
    "quantization": (setting(quantization_config={"quant_method": "x"}), "quantization_config"),
    "another kind": (setting(model_type="t5"), "model_type='t5' is not that of CLIPTextModel"),
    "huge": (setting(vocab_size=10**12), "vocab_size=1000000000000 cannot be"),
    "wide": (setting(hidden_size=2**20), "weights"),
    "many layers": (setting(num_hidden_layers=10**6), "layers|weights"),
    "missing weight": (lacking, "1 missing keys, first final_layer_norm.weight"),
    "another weight": (weights(more=torch.ones(1)), "unexpected keys, first more"),
    "another shape": (weights(**{"final_layer_norm.weight": torch.ones(3)}), "final_layer_norm.weight|mismatch"),
    "not a number": (weights(**{"final_layer_norm.weight": torch.full((12,), torch.nan)}), "not finite"),
    "integers": (weights(**{"final_layer_norm.weight": torch.ones(12, dtype=torch.int8)}), "quantized"),
    "pickle": (pickled, "expected safetensors"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapters"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_encoders_are_refused(damage: str, tmp_path: Path) -> None:
    folder = copied("flux", tmp_path) / "text_encoder"
    make, named = DAMAGES[damage]
    make(folder)
    with pytest.raises(ValueError, match=named) as error:
        load_text_encoder(folder, "CLIPTextModel")
    assert str(folder) in str(error.value)


CONFIG = "tokenizer_config.json"
TOKENIZER_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "auto_map": (setting(CONFIG, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}), "auto_map"),
    "another class": (setting(CONFIG, tokenizer_class="EvilTokenizer"), "EvilTokenizer"),
    "a file elsewhere": (setting(CONFIG, tokenizer_file="/etc/passwd"), "tokenizer_file"),
    "another vocabulary": (setting(CONFIG, vocab_file="../vocab.json"), "vocab_file"),
    "damaged": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    "a page": (lambda folder: (folder / "tokenizer.json").write_text("<!doctype html><html>"), "web page"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("damage", TOKENIZER_DAMAGES)
def test_damaged_and_hostile_tokenizers_are_refused(damage: str, tmp_path: Path) -> None:
    folder = copied("flux", tmp_path) / "tokenizer"
    make, named = TOKENIZER_DAMAGES[damage]
    make(folder)
    with pytest.raises(ValueError, match=named) as error:
        load_tokenizer(folder, "CLIPTokenizer")
    assert str(folder) in str(error.value)


@pytest.mark.bad_input
def test_other_classes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'AutoModel' is not supported"):
        load_text_encoder(GOLDENS / "flux/text_encoder", "AutoModel")
    with pytest.raises(ValueError, match="'AutoTokenizer' is not supported"):
        load_tokenizer(GOLDENS / "flux/tokenizer", "AutoTokenizer")
    folder = copied("flux", tmp_path)
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no vocabulary in .*tokenizer"):
        load_tokenizer(folder / "tokenizer", "CLIPTokenizer")
    (folder / "text_encoder/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_text_encoder(folder / "text_encoder", "CLIPTextModel")
