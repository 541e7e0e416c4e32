"""Attention with quantized operands, through diffusers' AttentionProcessor hook (`Attention.set_processor`)."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn


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
