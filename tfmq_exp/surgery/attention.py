"""Attention with quantized operands, through the processors that diffusers' attention modules call."""

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tfmq_exp.denoisers.families.unet import attentions


class QuantAttnProcessor(nn.Module):
    """softmax(Q(q) Q(k)^T / sqrt(d)) Q(v), with quantizers by operand: `query`, `key`, `value`, `probabilities`, or none.

    Quantizers take tensors with the batch first (q, k, v before the heads are split off), so that per-step scales work.
    """

    def __init__(self, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict(dict(quantizers))

    def quantized(self, operand: str, x: Tensor) -> Tensor:
        return self.quantizers[operand](x) if operand in self.quantizers else x

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch ..."],
        encoder_hidden_states: Float[Tensor, "batch tokens width"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Float[Tensor, "batch ..."]:
        """Attention as diffusers' AttnProcessor computes it, with an explicit softmax.

        Args:
            attn: module whose layers are used.
            hidden_states: [batch, tokens, channels] or [batch, channels, height, width].
            encoder_hidden_states: context of cross-attention; None for self-attention.
            attention_mask: must be None; ValueError for a mask, or a module with a spatial norm.
            temb: not used; diffusers looks for this name, and only spatial norms would read it.
        """
        assert attn.to_k is not None and attn.to_v is not None and attn.to_out is not None  # noqa: PT018
        if attention_mask is not None or attn.spatial_norm is not None:
            raise ValueError("quantized attention supports no mask or spatial norm")
        residual, shape = hidden_states, hidden_states.shape
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross and encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(context)
        operands = {"query": attn.to_q(x), "key": attn.to_k(context), "value": attn.to_v(context)}
        q, k, v = (
            self.quantized(operand, value).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for operand, value in operands.items()
        )
        probabilities = self.quantized("probabilities", (q @ k.transpose(-1, -2) * attn.scale).softmax(dim=-1))
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


class QuantizedProducts(TorchFunctionMode):
    """Attention's products with quantized operands wherever a network asks for `scaled_dot_product_attention` inside the block."""

    def __init__(self, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = dict(
            zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
        )
        given |= kwargs or {}
        operands = {name: self.quantized(name, given.pop(name)) for name in ("query", "key", "value")}
        if "probabilities" not in self.quantizers:
            return func(**operands, **given)
        if given.get("is_causal") or given.get("enable_gqa"):
            raise ValueError(
                "quantized probabilities support neither causal attention nor fewer heads of keys than of queries"
            )
        return self.product(
            operands["query"], operands["key"], operands["value"], given.get("attn_mask"), given.get("scale")
        )

    def quantized(self, operand: str, x: Tensor) -> Tensor:
        return self.quantizers[operand](x) if operand in self.quantizers else x

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention by an explicit softmax.

        Args:
            q: queries [batch, heads, tokens, width].
            k: keys.
            v: values.
            mask: of the scores, to be added, or true where they count.
            scale: of the scores; None for 1 / sqrt(width).
        """
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return self.quantized("probabilities", scores.softmax(dim=-1)) @ v


class QuantizedProcessor(nn.Module):
    """A processor of diffusers whose attention has quantized operands, after norms and rotary positions, split into heads.

    Args:
        processor: the module's own.
        quantizers: by operand: `query`, `key`, `value`, `probabilities`, or none.
    """

    def __init__(self, processor: Callable[..., Any], quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.__dict__["processor"] = processor  # no submodule: it has no weights
        self.quantizers: Any = nn.ModuleDict(dict(quantizers))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with QuantizedProducts(self.quantizers):
            return self.processor(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        """Attribute, where `__call__` shows the parameters of the processor: attention modules ask for them."""
        found = super().__getattribute__(name)
        if name != "__call__":
            return found
        shown = MethodType(lambda self, *args, **kwargs: found(*args, **kwargs), self)
        shown.__func__.__signature__ = inspect.signature(type(self.processor).__call__)  # type: ignore[attr-defined]
        return shown


def attention_modules(network: nn.Module) -> dict[str, Any]:
    """Modules whose attention products can have quantized operands, by name; linear attention (Sana) has no such products."""
    if unet := attentions(network):
        return dict(unet)
    found = {name: m for name, m in network.named_modules() if hasattr(m, "processor") and hasattr(m, "set_processor")}
    return {name: m for name, m in found.items() if "Linear" not in type(m.processor).__name__}


def quantize_operands(network: nn.Module, quantizers: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Give attention modules, by their names in the network, quantizers of their operands."""
    modules, of_unet = attention_modules(network), bool(attentions(network))
    for name, own in quantizers.items():
        attention = modules[name]
        processor = QuantAttnProcessor(own) if of_unet else QuantizedProcessor(attention.processor, own)
        attention.set_processor(processor)
