"""Labels and captions as conditions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from tests.helpers.originals import caption, read_original, word
from tfmq_exp.denoisers.loading.condition_encoders import ClassEmbedder, TextEncoder, load_text_model, read_tokenizer

STATES = "encoder_hidden_states"


def test_labels_are_rows_of_the_embedding() -> None:
    vectors = torch.arange(22.0).reshape(11, 2)
    found = ClassEmbedder(vectors)([3, 0, 3, 9])
    assert found.given[STATES].tolist() == [[[6.0, 7.0]], [[0.0, 1.0]], [[6.0, 7.0]], [[18.0, 19.0]]]
    assert found.null[STATES].tolist() == [[[20.0, 21.0]]]
    assert ClassEmbedder(vectors).example().given[STATES].shape == (1, 1, 2)


@pytest.mark.parametrize("wrong", [[10], [-1], [0, 11], ["3"], [True], [2.0], [None], []])
def test_labels_that_are_no_classes(wrong: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 9: got") as caught:
        ClassEmbedder(torch.zeros(11, 2))(wrong)
    assert str(caught.value).endswith(repr(wrong[-1]) if wrong else "none")


@pytest.fixture
def encoder(tokenizer: Path) -> TextEncoder:
    original, prefix = read_original("sd_v1"), "cond_stage_model.transformer."
    state = {k.removeprefix(prefix): v for k, v in original.state.items() if k.startswith(prefix)}
    return TextEncoder(load_text_model(original.config["clip_text_config"], state), read_tokenizer(tokenizer), rows=2)


def test_captions_are_the_recorded_tokens(encoder: TextEncoder) -> None:
    recorded = read_original("sd_v1").recorded
    captions = [caption(ids) for ids in recorded["input_ids"]]
    assert torch.equal(encoder.tokens(captions), recorded["input_ids"])
    assert torch.equal(encoder.tokens([f"  {captions[0].upper()} "]), recorded["input_ids"][:1])
    assert torch.equal(encoder.tokens([""]), recorded["uncond_input_ids"][:1])
    long = encoder.tokens([" ".join([word(5)] * 100)])
    assert long.tolist() == [[97, *[5] * 75, 98]]


def test_a_caption_has_the_same_states_in_any_company(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [word(1), word(2), word(1), "", word(3), word(2)]
    alone = [encoder([text]).given[STATES] for text in captions]
    rows: list[int] = []
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda ids, **rest: rows.append(len(ids)) or forward(ids, **rest))
    together = encoder(captions)
    assert rows == [2, 2]  # four that are different, two at a time
    torch.testing.assert_close(together.given[STATES], torch.cat(alone), atol=1e-5, rtol=0)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    torch.testing.assert_close(together.null[STATES], alone[3], atol=1e-5, rtol=0)
    assert torch.equal(encoder.example().given[STATES], together.null[STATES])


@pytest.mark.parametrize("wrong", [[3], [None], [b"x"], []])
def test_what_is_no_caption(wrong: list[Any], encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"caption for each image: got .*; captions=FILE gives"):
        encoder(wrong)


def test_a_tokenizer_of_another_model(tokenizer: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.random.fork_rng(), pytest.raises(ValueError, match="gives token 98 of 40"):
        TextEncoder(CLIPTextModel(config).eval(), read_tokenizer(tokenizer))


def test_a_damaged_tokenizer(tokenizer: Path) -> None:
    (tokenizer / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="words holds no tokenizer"):
        read_tokenizer(tokenizer)


def test_weights_of_another_text_model(tokenizer: Path) -> None:
    original, prefix = read_original("sd_v1"), "cond_stage_model.transformer."
    state = {k.removeprefix(prefix): v for k, v in original.state.items() if k.startswith(prefix)}
    with pytest.raises(ValueError, match=r"16 missing, first encoder\.layers\.2\."):
        load_text_model(original.config["clip_text_config"] | {"num_hidden_layers": 3}, state)
