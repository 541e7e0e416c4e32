"""Captions as conditions: CLIP's text model, as Stable Diffusion uses it (LDM's FrozenCLIPEmbedder)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tfmq_exp.core.file_kind import instead_of_text
from tfmq_exp.core.validate import number
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.loading.scheduler_config import read_json
from tfmq_exp.denoisers.loading.state_dict import assign_weights

# ViT-L/14, https://huggingface.co/openai/clip-vit-large-patch14
VIT_L_14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
COMPILED = "tokenizer.json"  # the same in one file, as newer versions of transformers write it
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SHORTEST = 3  # tokens
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", None)
# What of a tokenizer's settings would name code, or files elsewhere.
ELSEWHERE = ("auto_map", "init_inputs", "tokenizer_file", "vocab_file", "merges_file", "added_tokens_file")


class TextEncoder:
    """The last hidden states of CLIP's text model. No caption is the empty caption.

    Args:
        model: the text model; it runs where it is.
        tokenizer: of the same CLIP.
        rows: how many captions go through the model together.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, rows: int = 64) -> None:
        self.model: Any = model
        self.tokenizer, self.rows = tokenizer, rows
        self.length = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
        self.null = self.embed(self.tokens([""]))

    def tokens(self, captions: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids between the start and end of text, cut and padded to the tokenizer's length, at most the model's.

        Raises:
            ValueError: ids that the model does not have.
        """
        known = self.model.config.vocab_size
        encoded = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids: Tensor = encoded["input_ids"]  # type: ignore[assignment]  # a tensor, for return_tensors="pt"
        if int(ids.max()) >= known:
            raise ValueError(f"the tokenizer is not this model's: it gives token {int(ids.max())} of {known}")
        return ids

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length channels"]:
        """Hidden states of token ids, after the final norm, on the CPU."""
        parts = [self.model(part.to(self.model.device)).last_hidden_state.cpu() for part in ids.split(self.rows)]
        return torch.cat(parts)

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of these captions; the model runs once for each that is different.

        Raises:
            ValueError: no caption, or something that is none.
        """
        wrong = [caption for caption in choices if not isinstance(caption, str)]
        if wrong or not choices:
            given = f"got {wrong[0]!r}" if wrong else "got none"
            raise ValueError(
                f"this network is conditioned on a caption for each image: {given}; captions=FILE gives a file with one a line "
                "(model.sampling.conditioning in full)"
            )
        distinct = list(dict.fromkeys(choices))
        found = self.embed(self.tokens(distinct))[[distinct.index(caption) for caption in choices]]
        return Conditions({"encoder_hidden_states": found}, {"encoder_hidden_states": self.null})

    def example(self) -> Conditions:
        """Of the empty caption."""
        return Conditions({"encoder_hidden_states": self.null}, {"encoder_hidden_states": self.null})

    def count_cut(self, captions: Sequence[str]) -> dict[str, int]:
        """How many different captions these are, how many are longer than the model takes, and that length in tokens."""
        distinct = list(dict.fromkeys(captions))
        ids: Any = self.tokenizer(distinct, verbose=False)["input_ids"] if distinct else []
        return {"different": len(distinct), "cut": sum(len(row) > self.length for row in ids), "tokens": self.length}

    def to(self, device: torch.device) -> None:
        """The text model moves."""
        self.model.to(device)


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files that make a tokenizer; FileNotFoundError if they are not there."""
    files = [folder / name for name in (*TOKENIZER_FILES, COMPILED) if (folder / name).is_file()] if folder else []
    names = {file.name for file in files}
    if COMPILED not in names and (missing := [name for name in TOKENIZER_FILES if name not in names]):
        raise FileNotFoundError(
            f"no tokenizer: expected {' and '.join(missing)} in the folder that `tokenizer` names, got {folder}; Stable "
            "Diffusion's are those of openai/clip-vit-large-patch14 (docs/checkpoints.md); nothing is downloaded"
        )
    return files


def tokenizer_settings(folder: Path) -> list[Path]:
    """The files beside a tokenizer's own that change what it does."""
    return [folder / name for name in TOKENIZER_SETTINGS if (folder / name).is_file()]


def check_tokenizer(file: Path) -> None:
    """ValueError for settings of another tokenizer, or that name code or files elsewhere."""
    if not file.is_file():
        return
    settings = read_json(file)
    if settings.get("tokenizer_class") not in TOKENIZERS:
        raise ValueError(f"{file}: tokenizer_class={settings['tokenizer_class']!r:.80}; expected {TOKENIZERS[0]}")
    if named := [key for key in ELSEWHERE if settings.get(key)]:
        raise ValueError(
            f"{file}: {named[0]}={settings[named[0]]!r:.80} is refused: the tokenizer is what is in its folder"
        )
    length = settings.get("model_max_length")
    if length is not None and not (number(length) and length >= SHORTEST and length == int(length)):
        raise ValueError(
            f"{file}: model_max_length must be a whole number, at least {SHORTEST} (start, a word, end), got {length!r:.80}"
        )


def read_tokenizer(folder: Path | None) -> CLIPTokenizer:
    """CLIP's tokenizer from a local folder; nothing is downloaded.

    Raises:
        FileNotFoundError: no folder, or not its files.
        ValueError: files that are no tokenizer.
    """
    files = tokenizer_files(folder)
    for file in (*files, *tokenizer_settings(Path(str(folder)))):
        if kind := instead_of_text(file):
            raise ValueError(f"{file} {kind}")
    check_tokenizer(Path(str(folder)) / TOKENIZER_SETTINGS[0])
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files fail in whatever way they lead to
        raise ValueError(f"{folder} holds no tokenizer of CLIP: {type(error).__name__}: {error}") from error


def load_text_model(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CLIPTextModel:
    """CLIP's text model with its weights, loaded strictly; it takes them over.

    Args:
        config: of transformers' CLIPTextConfig; `VIT_L_14` for Stable Diffusion 1.
        state: parameters by the names they have in the original file, below `cond_stage_model.transformer.`.

    Raises:
        ValueError: weights that do not fit.
    """
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config))
    # the level that the names begin with is in transformers 4 and not in 5
    nested = any(name.startswith("text_model.") for name in model.state_dict())
    names = {name: name if nested else name.removeprefix("text_model.") for name in state}
    assign_weights(model, {names[n]: value for n, value in state.items() if not n.endswith("embeddings.position_ids")})
    for name, buffer in list(model.named_buffers()):  # positions 0, 1, ..: computed, not stored
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model
