"""Words among the tokens of tiny pipelines' tokenizers."""

from typing import Any

import pytest
import transformers

from tests.helpers.pipelines import GOLDENS, call_of
from tests.helpers.tiny_pipelines import part
from tfmq_exp.denoisers.denoiser import NoConditions
from tfmq_exp.denoisers.loading.condition_encoders import TextEncoder
from tfmq_exp.denoisers.pipelines.load import load_pipeline
from tfmq_exp.diagnostics.word_tokens import word_tokens


@pytest.fixture(scope="module")
def clip() -> TextEncoder:
    text = (part(transformers.CLIPTextModel, "flux/text_encoder"), part(transformers.CLIPTokenizer, "flux/tokenizer"))
    return TextEncoder(*text)


def read(encoder: TextEncoder, caption: str, places: list[int]) -> str:
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.tokens([caption])[0][places].tolist())
    return "".join(tokens).replace("</w>", " ")


def test_tokens_spell_the_word(clip: TextEncoder) -> None:
    captions = ["a photo of a cat", "Photo: the sea, a photo!", "photographs"]
    found = word_tokens(clip, captions, ["photo", "cat"])
    assert {word: list(places) for word, places in found.items()} == {"photo": [0, 1], "cat": [0]}
    assert read(clip, captions[0], found["photo"][0]).strip() == "photo"
    assert read(clip, captions[1], found["photo"][1]).split() == ["photo", "photo"]


def test_words_that_are_not_there_are_named(clip: TextEncoder) -> None:
    assert word_tokens(clip, [], []) == {}
    with pytest.raises(ValueError, match="'dog' is in none of the 1 captions"):
        word_tokens(clip, ["hotdogs"], ["dog"])
    cut = "a " * 2 * clip.length + "cat"
    with pytest.raises(ValueError, match="as far as the network reads them"):
        word_tokens(clip, [cut], ["cat"])


def test_pixart_reads_lower_case() -> None:
    encoder = load_pipeline(GOLDENS / "pixart", settings=settings("pixart")).encoder
    (tokens,) = word_tokens(encoder, ["A Photo of a CAT"], ["cat"]).values()
    assert tokens == {0: [4]}


def settings(name: str) -> dict[str, Any]:
    return {key: value for key, value in call_of(name)[1].items() if key != "num_inference_steps"}


def test_joint_attention_and_no_text_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="which a FluxPipeline does not have"):
        word_tokens(load_pipeline(GOLDENS / "flux", settings=settings("flux")).encoder, ["a cat"], ["cat"])
    with pytest.raises(ValueError, match="network that reads no text"):
        word_tokens(NoConditions(), [], ["cat"])
