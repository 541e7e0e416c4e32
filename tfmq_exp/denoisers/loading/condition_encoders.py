"""Class labels (LDM's ClassEmbedder) and captions (its FrozenCLIPEmbedder: CLIP's text model) as conditions."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tfmq_exp.core.file_kind import instead_of_text
from tfmq_exp.core.files import read_json
from tfmq_exp.core.validate import number
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.loading.checkpoint import assign_weights

# ViT-L/14, https://huggingface.co/openai/clip-vit-large-patch14
VIT_L_14 = {
    **{"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77},
    **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
COMPILED = "tokenizer.json"  # both in one file, as newer versions of transformers write it
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ENCODER = "text_encoder"  # the name that pipelines of diffusers have for it
SHORTEST = 3  # tokens: start, a word, end
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", None)
# Settings of a tokenizer that would name code, or files elsewhere.
ELSEWHERE = ("auto_map", "init_inputs", "tokenizer_file", "vocab_file", "merges_file", "added_tokens_file")


def require_labels(choices: Sequence[Any], classes: int) -> None:
    """Raise ValueError for no label, or one that is no class."""
    wrong = [label for label in choices if type(label) is not int or not 0 <= label < classes]
    if wrong or not choices:
        given = f"got {wrong[0]!r}" if wrong else "got none"
        raise ValueError(f"this network is conditioned on a class for each image, 0 .. {classes - 1}: {given}")


class ClassEmbedder:
    """One learned vector for each class, and last one of no class, as a sequence of length one for cross-attention."""

    def __init__(self, embedding: Float[Tensor, "classes channels"]) -> None:
        self.embedding = embedding

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of these labels; ValueError for no label, or one that is no class."""
        require_labels(choices, len(self.embedding) - 1)
        given, null = self.embedding[list(choices)], self.embedding[-1:]
        return Conditions({"encoder_hidden_states": given[:, None]}, {"encoder_hidden_states": null[:, None]})

    def example(self) -> Conditions:
        return self([0])

    def to(self, device: torch.device) -> None:
        self.embedding = self.embedding.to(device)


class ClassLabels:
    """Labels 0 .. classes - 1 for networks that embed them themselves (DiT); the label of no class is the one after them.

    `guided_channels` is that of their conditions.
    """

    def __init__(self, classes: int, guided_channels: int | None = None) -> None:
        self.classes, self.guided_channels, self.device = classes, guided_channels, torch.device("cpu")

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of these labels; ValueError for no label, or one that is no class."""
        require_labels(choices, self.classes)
        given, null = (torch.tensor(labels, device=self.device) for labels in (list(choices), [self.classes]))
        return Conditions({"class_labels": given}, {"class_labels": null}, guided_channels=self.guided_channels)

    def example(self) -> Conditions:
        return self([0])

    def to(self, device: torch.device) -> None:
        self.device = device


class TextEncoder:
    """The last hidden states of CLIP's text model, `rows` captions at a time. No caption is the empty caption."""

    text_encoder_names = (ENCODER,)

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, rows: int = 64) -> None:
        self.model: Any = model
        self.tokenizer, self.rows = tokenizer, rows
        self.length = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
        self.null = self.embed(self.tokens([""]))

    def tokens(self, captions: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids between the start and end of text, cut and padded to the tokenizer's length, at most the model's."""
        known, options = self.model.config.vocab_size, {"padding": "max_length", "truncation": True}
        encoded: Any = self.tokenizer(list(captions), max_length=self.length, return_tensors="pt", **options)
        ids: Tensor = encoded["input_ids"]
        if int(ids.max()) >= known:
            raise ValueError(f"the tokenizer is not this model's: it gives token {int(ids.max())} of {known}")
        return ids

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length channels"]:
        """Hidden states of token ids, after the final norm, on the CPU."""
        parts = [self.model(part.to(self.model.device)).last_hidden_state.cpu() for part in ids.split(self.rows)]
        return torch.cat(parts)

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of these captions, each different one computed once; ValueError for none, or another kind of value."""
        wrong = [caption for caption in choices if not isinstance(caption, str)]
        if wrong or not choices:
            given = f"got {wrong[0]!r}" if wrong else "got none"
            where = "captions=FILE gives a file with one a line (model.sampling.conditioning in full)"
            raise ValueError(f"this network is conditioned on a caption for each image: {given}; {where}")
        distinct = list(dict.fromkeys(choices))
        found = self.embed(self.tokens(distinct))[[distinct.index(caption) for caption in choices]]
        return Conditions({"encoder_hidden_states": found}, {"encoder_hidden_states": self.null})

    def example(self) -> Conditions:
        return Conditions({"encoder_hidden_states": self.null}, {"encoder_hidden_states": self.null})

    def text_encoders(self) -> Mapping[str, Any]:
        """A copy of the text model by its name."""
        return {ENCODER: copy.deepcopy(self.model)}

    def run_text_encoders(self, encoders: Mapping[str, Any], texts: Sequence[str]) -> None:
        """Call another text model for each different text, and for none."""
        for part in self.tokens(["", *dict.fromkeys(texts)]).split(self.rows):
            encoders[ENCODER](part.to(self.model.device))

    def with_text_encoders(self, encoders: Callable[[], Mapping[str, Any]]) -> "TextEncoder":
        """Conditions of another text model."""
        return TextEncoder(encoders()[ENCODER].to(self.model.device), self.tokenizer, self.rows)

    def count_cut(self, captions: Sequence[str]) -> dict[str, int]:
        """The number of different captions, of those that are cut, and the length in tokens at which they are."""
        distinct = list(dict.fromkeys(captions))
        ids: Any = self.tokenizer(distinct, verbose=False)["input_ids"] if distinct else []
        return {"different": len(distinct), "cut": sum(len(row) > self.length for row in ids), "tokens": self.length}

    def to(self, device: torch.device) -> None:
        self.model.to(device)


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files of a tokenizer and its settings; FileNotFoundError without the former."""
    names = (*TOKENIZER_FILES, COMPILED, *TOKENIZER_SETTINGS)
    files = {name: folder / name for name in names if (folder / name).is_file()} if folder else {}
    if COMPILED not in files and (missing := [name for name in TOKENIZER_FILES if name not in files]):
        where = (
            f"in the folder that `tokenizer` names, got {folder}; docs/checkpoints.md says which; nothing is downloaded"
        )
        raise FileNotFoundError(f"no tokenizer: expected {' and '.join(missing)} {where}")
    return list(files.values())


def check_tokenizer(file: Path, classes: Sequence[str | None] = TOKENIZERS) -> None:
    """ValueError for a `tokenizer_config.json` of another tokenizer, or one that names code or files elsewhere."""
    settings = read_json(file) if file.is_file() else {}
    length, wrong = settings.get("model_max_length"), ""
    if settings.get("tokenizer_class") not in classes:
        wrong = f"tokenizer_class={settings['tokenizer_class']!r:.80}; expected {classes[0]}"
    elif named := [f"{key}={settings[key]!r:.80}" for key in ELSEWHERE if settings.get(key)]:
        wrong = f"{named[0]} is refused: the tokenizer is what is in its folder"
    elif length is not None and not (number(length) and length >= SHORTEST and length == int(length)):
        wrong = f"model_max_length must be a whole number, at least {SHORTEST}, got {length!r:.80}"
    if wrong:
        raise ValueError(f"{file}: {wrong}")


def read_tokenizer(folder: Path | None) -> CLIPTokenizer:
    """Read CLIP's tokenizer from a local folder; FileNotFoundError without its files, ValueError if they are others."""
    files = tokenizer_files(folder)
    home = files[0].parent
    for file in files:
        if kind := instead_of_text(file):
            raise ValueError(f"{file} {kind}")
    check_tokenizer(home / TOKENIZER_SETTINGS[0])
    try:
        return CLIPTokenizer.from_pretrained(str(home), local_files_only=True)
    except Exception as error:  # damaged files fail in any way
        raise ValueError(f"{home} holds no tokenizer of CLIP: {type(error).__name__}: {error}") from error


def load_text_model(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CLIPTextModel:
    """Build CLIP's text model and load its weights, by their names below `cond_stage_model.transformer.`, strictly."""
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config))
    assign_text_weights(model, state)
    return model


def assign_text_weights(model: CLIPTextModel, state: Mapping[str, Tensor]) -> None:
    """`assign_weights` to a text model on the meta device."""
    # the level that the names begin with is in transformers 4 and not in 5
    level = "" if any(name.startswith("text_model.") for name in model.state_dict()) else "text_model."
    kept = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
    assign_weights(model, {name.removeprefix(level): value for name, value in kept.items()})
    for name, buffer in list(model.named_buffers()):  # positions 0, 1, ..: computed, not stored
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape))
