"""Quantization of text encoders: linear layers, a block at a time, on the texts that a pipeline gives them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite, within
from tfmq_exp.core.validate import Checked, instance_of, one_of, optional
from tfmq_exp.denoisers.pipelines.text_components import text_blocks, text_layers
from tfmq_exp.quant.gptq import Moments
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.reconstruction.closed_form import GPTQConfig, round_weight
from tfmq_exp.reconstruction.recorded_calls import StopForward
from tfmq_exp.surgery.config import INPUT_BITS, WEIGHT_BITS, SchemeConfig
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, quantize_in_place
from tfmq_exp.surgery.resolve import ActivationConfig, LayerConfig, ResolvedConfig

Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # arguments and keyword arguments of an encoder


@dataclass(frozen=True)
class TextEncoderBits(Checked):
    """Bits of the linear layers of every text encoder.

    Args:
        name: of these bits in results.
        weight: bits of weights.
        activation: bits of inputs, with a range for every token at run time; None for float.
        gptq: rounding in closed form on the calibration prompts; None for rounding to nearest, which needs none.
    """

    name: str
    weight: Annotated[int, one_of(*WEIGHT_BITS)]
    activation: Annotated[int | None, optional(one_of(*INPUT_BITS))]
    gptq: Annotated[GPTQConfig | None, optional(instance_of(GPTQConfig))] = None

    def resolved(self, encoder: nn.Module) -> ResolvedConfig:
        """Quantizers of every layer."""
        weight = SchemeConfig().weight(self.weight)
        scale = DynamicConfig("token")
        inputs = None if self.activation is None else ActivationConfig((QuantSpec(self.activation),), scale)
        return ResolvedConfig({name: LayerConfig(weight, inputs) for name in text_layers(encoder)}, {}, (0,), "error")


@contextmanager
def recorded_text_calls(encoders: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Arguments of every call of some text encoders inside this block, by the encoder's name."""
    calls: dict[str, list[Call]] = {name: [] for name in encoders}
    with ExitStack() as hooks:
        for name, encoder in encoders.items():

            def note(_: nn.Module, args: Any, kwargs: Any, *, found: list[Call] = calls[name]) -> None:
                found.append((args, kwargs))

            hooks.enter_context(encoder.register_forward_pre_hook(note, with_kwargs=True))
        yield calls


def quantize_text_encoder(
    encoder: nn.Module, bits: TextEncoderBits, observer: Observer, calls: Sequence[Call]
) -> QuantizedNetwork:
    """Quantize a text encoder in its place, which takes no memory beyond it and the moments of one block.

    With GPTQ a block is rounded on what the quantized blocks before it give; inputs are float meanwhile.

    Args:
        encoder: of a class of transformers; it is the returned network's own.
        bits: how.
        observer: of weight ranges.
        calls: of the calibration prompts.

    Raises:
        ValueError: GPTQ without calls, or with inputs that are not finite.
    """
    if bits.gptq and not calls:
        raise ValueError("GPTQ rounds weights on calibration prompts: there are none")
    blocks = text_blocks(encoder)
    model = quantize_in_place(encoder, bits.resolved(encoder), observer)
    for block, names in blocks.items():
        model.calibrate_weights(names)
        moments = second_moments(encoder, block, names, calls) if bits.gptq else {}
        for name in names:
            if bits.gptq and name in moments:
                with within(f"the weight of {name}"):
                    round_weight(model.layer(name), moments[name], bits.gptq)
            model.freeze(name)
    model.set_activations(Mode.QUANTIZE)
    return model


@torch.no_grad()
def second_moments(encoder: nn.Module, block: str, names: Sequence[str], calls: Sequence[Call]) -> dict[str, Moments]:
    """H = X^T X over all tokens at the inputs of some layers of a block, by layer; none for a layer that does not run.

    Padding counts, for most networks read it like words.
    """
    found: dict[str, Moments] = {}

    def add(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        with within(f"the inputs of {name}"):
            vectors = require_finite(args[0], "a layer's input").float().flatten(0, -2)
        found[name] = found.get(name, 0) + (vectors.T @ vectors)[None]

    def stop(*_: Any) -> None:
        raise StopForward

    with ExitStack() as hooks:
        for name in names:
            layer = encoder.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(partial(add, name)))
        hooks.enter_context(encoder.get_submodule(block).register_forward_hook(stop))
        for args, kwargs in calls:
            with suppress(StopForward):
                encoder(*args, **kwargs)
    return found


@torch.no_grad()
def embeddings(encoder: nn.Module, calls: Sequence[Call]) -> list[Float[Tensor, "batch tokens width"]]:
    """The last hidden states of some calls, on the CPU."""
    found: list[Tensor] = []
    for args, kwargs in calls:
        output: Any = encoder(*args, **kwargs)
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            states = output.hidden_states[-1] if getattr(output, "hidden_states", None) else output[0]
        found.append(states.float().cpu())
    return found


def embedding_error(quantized: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """`relative_error` |q - e| / |e| over all tokens, and the mean `cosine` of a token's two embeddings."""
    q, e = (torch.cat([part.flatten(0, -2).double() for part in parts]) for parts in (quantized, exact))
    cosine = nn.functional.cosine_similarity(q, e, dim=-1).mean()
    return {"relative_error": float((q - e).norm() / e.norm()), "cosine": float(cosine)}
