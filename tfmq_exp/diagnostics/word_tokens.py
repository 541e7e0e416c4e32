"""Places of words among the tokens that cross-attention reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfmq_exp.denoisers.loading.condition_encoders import TextEncoder
from tfmq_exp.denoisers.pipelines.load import PipelineEncoder
from tfmq_exp.denoisers.pipelines.text_components import load_tokenizer

# Pipelines whose cross-attention reads the tokens of one text as their tokenizer has them; of SDXL's two both have the same.
CLIP = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
T5 = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")  # which are given the text in lower case


def tokenizer_of(encoder: Any) -> Any:
    """The tokenizer of a network whose cross-attention reads one text; ValueError, with its name, for others."""
    if isinstance(encoder, TextEncoder):
        return encoder.tokenizer
    if isinstance(encoder, PipelineEncoder) and encoder.folder.name in (*CLIP, *T5):
        folder, kind = encoder.folder.components["tokenizer"]
        return load_tokenizer(folder, kind)
    name = encoder.folder.name if isinstance(encoder, PipelineEncoder) else "network that reads no text"
    raise ValueError(
        f"diagnosis.words are for cross-attention to one text, which a {name} does not have; leave them out. "
        f"Known are original checkpoints of Stable Diffusion, {', '.join((*CLIP, *T5))}; joint attention is not shown"
    )


def word_tokens(encoder: Any, captions: Sequence[str], words: Sequence[str]) -> dict[str, dict[int, list[int]]]:
    """Places of each word's tokens in each caption that has it, by word and number of the caption; a repeated word has all of its places.

    Raises:
        ValueError: a network without such attention, or a word that is in no caption, or beyond the tokens that are read.
    """
    if not words:
        return {}
    tokenizer = tokenizer_of(encoder)
    lower = isinstance(encoder, PipelineEncoder) and encoder.folder.name in T5
    options = _lengths(encoder, tokenizer)
    texts = [caption.lower().strip() if lower else caption for caption in captions]
    spans = [tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"] for text in texts]
    found: dict[str, dict[int, list[int]]] = {}
    for word in words:
        whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
        places = {
            i: [
                place
                for place, (start, end) in enumerate(own)
                if any(start < match.end() and match.start() < end for match in whole.finditer(text))
            ]
            for i, (text, own) in enumerate(zip(texts, spans, strict=True))
        }
        found[word] = {i: tokens for i, tokens in places.items() if tokens}
        if not found[word]:
            raise ValueError(
                f"diagnosis.words: {word!r} is in none of the {len(captions)} captions of the trajectories that are followed, "
                f"as far as the network reads them; the first is {captions[0]!r:.80}"
            )
    return found


def _lengths(encoder: Any, tokenizer: Any) -> Mapping[str, Any]:
    """Options by which the tokenizer cuts a text as it is cut for the network."""
    if isinstance(encoder, TextEncoder):
        return {"truncation": True, "max_length": encoder.length}
    longest = encoder.shared.null or encoder.example().given
    return {
        "truncation": True,
        "max_length": min(longest["encoder_hidden_states"].shape[1], tokenizer.model_max_length),
    }
