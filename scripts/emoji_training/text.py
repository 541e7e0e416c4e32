"""The tokenizer and the text encoder, both of CLIP's kind, and tokens of captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tfmq_exp.core.files import read_json

WIDTH = 96  # of the text encoder's states
LENGTH = 20  # tokens of a caption, with those of begin and end
VOCABULARY = 2400
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Write a tokenizer whose tokens are the words that occur in two texts or more, and pieces of others."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    ends: Any = {"end_of_word_suffix": "</w>", "special_tokens": [BEGIN, END], "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=2, **ends))
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    vocabulary: Any = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: Any = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH).save_pretrained(folder)


def load_tokenizer(texts: Sequence[str], folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder; made there from the texts if there is none, for a resumed training needs the same."""
    if not (folder / "tokenizer_config.json").exists():
        train_tokenizer(texts, folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokens_of(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Int[Tensor, "texts length"]:
    """Tokens as the pipeline makes them: all of one length."""
    options: Any = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return tokenizer(list(texts), **options).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of CLIP's text transformer (arXiv 2103.00020)."""
    ids: Any = tokenizer  # whose numbers are annotated as any kind of value
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
        pad_token_id=ids.pad_token_id,
    )
    return CLIPTextModel(config)
