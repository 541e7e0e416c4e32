"""Text encoders quantized: numbers by hand, what GPTQ gains, artefacts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.components import ENCODERS, encoder, text_calls
from tfmq_exp.denoisers.pipelines.text_components import text_blocks, text_layers
from tfmq_exp.methods.text_encoder import (
    TextEncoderBits,
    embedding_error,
    embeddings,
    quantize_text_encoder,
    second_moments,
)
from tfmq_exp.quant.grids.groups import quantize_groups
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.reconstruction.closed_form import GPTQConfig
from tfmq_exp.surgery import serialization

BY_ENCODER = pytest.mark.parametrize(("pipeline", "component"), ENCODERS)
W8A8 = TextEncoderBits("w8a8", 8, 8)


def rounded(x: Tensor, lo: Tensor, hi: Tensor, levels: int) -> Tensor:
    """Asymmetric quantization of rows by ranges that hold zero."""
    scale = (hi - lo) / (levels - 1)
    zero = (-lo / scale).round()
    return (((x / scale).round() + zero).clamp(0, levels - 1) - zero) * scale


def quantized_by_hand(model: Any, bits: int) -> Any:
    """A copy whose linear layers quantize weights by rows and inputs by tokens, in a slow way."""
    by_hand = copy.deepcopy(model)
    for name in text_layers(by_hand):
        layer: Any = by_hand.get_submodule(name)
        rows = []
        for row in layer.weight:
            lo, hi = row.min().clamp(max=0), row.max().clamp(min=0)
            if bits == 8:  # symmetric: what integer engines execute exactly
                scale = row.abs().max() / 127
                rows.append((row / scale).round() * scale)
            else:
                rows.append(rounded(row, lo, hi, 2**bits))
        layer.weight = nn.Parameter(torch.stack(rows), requires_grad=False)

        def tokens(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            each = [rounded(x, x.min().clamp(max=0), x.max().clamp(min=0), 256) for x in args[0].flatten(0, -2)]
            return (torch.stack(each).reshape(args[0].shape),)

        layer.register_forward_pre_hook(tokens)
    return by_hand


@BY_ENCODER
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_to_nearest_it_is_what_formulas_say(pipeline: str, component: str, bits: int) -> None:
    model = encoder(pipeline, component)
    by_hand, calls = quantized_by_hand(model, bits), text_calls(model, 2)
    expected, exact = embeddings(by_hand, calls), embeddings(model, calls)
    ours = quantize_text_encoder(model, TextEncoderBits("bits", bits, 8), MinMax(), [])
    found = embeddings(ours.network, calls)
    # a code that is rounded the other way at a tie changes little; quantization itself changes more
    assert embedding_error(found, expected)["relative_error"] < 0.1 * embedding_error(found, exact)["relative_error"]


@BY_ENCODER
def test_gptq_lowers_the_error_of_texts_that_it_has_not_seen(pipeline: str, component: str) -> None:
    """And that of every layer of the first block on the inputs that it was rounded on, by a twentieth and more."""
    model = encoder(pipeline, component)
    learned, held_out = text_calls(model, 24), text_calls(model, 8, seed=1)
    exact, (block, names) = embeddings(model, held_out), next(iter(text_blocks(model).items()))
    moments = second_moments(model, block, names, learned)
    nearest, rounded_by_gptq = (
        quantize_text_encoder(copy.deepcopy(model), TextEncoderBits("w3", 3, None, gptq), MinMax(), learned)
        for gptq in (None, GPTQConfig())
    )
    errors = [embedding_error(embeddings(ours.network, held_out), exact) for ours in (nearest, rounded_by_gptq)]
    assert errors[1]["relative_error"] < errors[0]["relative_error"]
    assert errors[1]["cosine"] > errors[0]["cosine"]

    def layer_error(ours: Any, name: str) -> float:
        difference = ours.layer(name).weight - model.get_submodule(name).get_parameter("weight")
        return float((difference @ moments[name][0] @ difference.T).trace())

    for name in names:
        assert layer_error(rounded_by_gptq, name) < 0.95 * layer_error(nearest, name)


@BY_ENCODER
def test_an_artefact_gives_the_same_bits(pipeline: str, component: str, tmp_path: Path) -> None:
    model, file = encoder(pipeline, component), tmp_path / "text_encoder.safetensors"
    calls = text_calls(model, 2)
    ours = quantize_text_encoder(model, TextEncoderBits("w4a8", 4, 8, GPTQConfig()), MinMax(), calls)
    serialization.save(ours, file)
    loaded = serialization.load(file)
    assert type(loaded.network) is type(model)
    for a, b in zip(embeddings(ours.network, calls), embeddings(loaded.network, calls), strict=True):
        assert torch.equal(a, b)


def test_moments_are_those_of_the_inputs() -> None:
    """Of the second block's query: the output of the first block after the norm, over all tokens."""
    model = encoder("flux", "text_encoder")
    calls, blocks = text_calls(model, 3), text_blocks(model)
    block = "encoder.layers.1"
    found = second_moments(model, block, blocks[block], calls)
    assert found.keys() == {*blocks[block]}
    expected: Any = 0
    for (ids,), _ in calls:
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[1]
            rows = model.get_submodule(f"{block}.layer_norm1")(states).flatten(0, 1)
        expected = expected + rows.T @ rows
    assert torch.allclose(found[f"{block}.self_attn.q_proj"][0], expected, rtol=1e-4, atol=1e-5)


def test_blocks_hold_every_layer_once_and_no_heads_of_words() -> None:
    for place in ENCODERS:
        model = encoder(*place)
        blocks = text_blocks(model)
        assert [name for names in blocks.values() for name in names] == text_layers(model)
        assert all(f"{name}.".startswith(f"{block}.") for block, names in blocks.items() for name in names)
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert linear == {*text_layers(model)}


def test_a_range_for_every_token_is_that_of_one_group() -> None:
    model = encoder("flux", "text_encoder_2")
    ours = quantize_text_encoder(model, W8A8, MinMax(), [])
    layer = ours.layer(ours.weight_layers()[0])
    x = torch.randn(2, 5, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.input_quantizer(x), quantize_groups(x, QuantSpec(8)))


def test_errors_of_embeddings() -> None:
    exact = [torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])]
    turned = [torch.tensor([[[0.0, 3.0], [0.0, 4.0]]])]  # the first token at a right angle
    found = embedding_error(turned, exact)
    assert found["cosine"] == pytest.approx(0.5)
    assert found["relative_error"] == pytest.approx(18**0.5 / 5)


@pytest.mark.bad_input
def test_bits_that_cannot_be_and_texts_that_are_missing() -> None:
    for wrong in ({"weight": 9}, {"activation": 2}, {"gptq": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TextEncoderBits(**{"name": "x", "weight": 4, "activation": 8, **wrong})
    with pytest.raises(ValueError, match="GPTQ rounds weights on calibration prompts: there are none"):
        quantize_text_encoder(encoder("flux", "text_encoder"), TextEncoderBits("w4", 4, 8, GPTQConfig()), MinMax(), [])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("network", "NoSuchModel", "unknown network 'NoSuchModel'"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 cannot be"),
        ("hidden_size", 2**19, "its settings describe"),
        ("auto_map", {"AutoModel": "code.py"}, "a folder may not say which code is used"),
    ],
)
def test_hostile_settings_of_an_artefact_are_refused(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    from tests.unit.surgery.changes import Content
    from tests.unit.surgery.test_hostile_artifacts import refusal, write

    model = quantize_text_encoder(encoder("flux", "text_encoder"), W8A8, MinMax(), [])
    serialization.save(model, tmp_path / "model.safetensors")
    content = Content(*serialization.read(tmp_path / "model.safetensors"))
    (content.manifest if key == "network" else content.config())[key] = value
    assert reason in refusal(write(content, tmp_path / "changed.safetensors"))
