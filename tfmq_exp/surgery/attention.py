"""Attention with quantized operands, through diffusers' own seam (`Attention.set_processor`)."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn


class QuantAttnProcessor(nn.Module):
    """softmax(Q(q) Q(k)^T / sqrt(d)) Q(v), with the probabilities quantized too where a quantizer is given.

    Quantizers see the batch first (q, k, v before the heads are split off), so that per-step scales work.
    """

    def __init__(self, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict({k: quantizers[k] for k in quantizers})

    def on(self, operand: str, x: Tensor) -> Tensor:
        """The operand through its quantizer, if it has one."""
        return self.quantizers[operand](x) if operand in self.quantizers else x

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch ..."],
        encoder_hidden_states: Float[Tensor, "batch tokens width"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # diffusers passes it to every processor; only spatial norms read it
        **_: Any,
    ) -> Float[Tensor, "batch ..."]:
        """As diffusers' AttnProcessor, with an explicit softmax."""
        assert attn.to_k is not None
        assert attn.to_v is not None
        assert attn.to_out is not None
        if attention_mask is not None or attn.spatial_norm is not None:
            raise ValueError("quantized attention supports no mask or spatial norm")
        residual, shape = hidden_states, hidden_states.shape
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross and encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(context)
        q = self.on("query", attn.to_q(x)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        k = self.on("key", attn.to_k(context)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        v = self.on("value", attn.to_v(context)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        probabilities = self.on("probabilities", (q @ k.transpose(-1, -2) * attn.scale).softmax(dim=-1))
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor
