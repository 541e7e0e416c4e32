"""Decoders of first stages (AutoencoderKL, VQModel, AutoencoderTiny, AutoencoderDC) as networks that know no timestep."""

from typing import Any

import diffusers
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.denoisers.families.family import Family, blocks_by_pattern, roles_by_pattern
from tfmq_exp.denoisers.structure import Kind, Role

AUTOENCODERS: dict[str, Any] = {
    name: getattr(diffusers, name) for name in ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC")
}
# what these run between latents and images, in order
PARTS = ("quantize", "post_quant_conv", "decoder")
INNER_ROLES = roles_by_pattern(
    {
        **dict.fromkeys(("post_quant_conv", "decoder.conv_in", "decoder.layers.0"), Role.STEM),
        "decoder.conv_out": Role.HEAD,
        **dict.fromkeys(("*.to_[qkv]", "*.to_qkv_multiscale.*"), Role.ATTN_QKV),
        **dict.fromkeys(("*.to_out", "*.to_out.0"), Role.ATTN_OUT),
        "*.conv_shortcut": Role.SHORTCUT,
        "*.skip": Role.SHORTCUT,
        **dict.fromkeys(("*.conv1", "*.conv2", "decoder.layers.*.conv.*"), Role.RES_CONV),
        **dict.fromkeys(("*.conv_inverted", "*.conv_depth", "*.conv_point"), Role.FEED_FORWARD),
        # of AutoencoderTiny the rest that is on the top level
        **dict.fromkeys(("*.upsamplers.*.conv", "decoder.up_blocks.*.conv", "decoder.layers.*"), Role.UPSAMPLE),
    }
)
BLOCKS = blocks_by_pattern(
    {
        **dict.fromkeys(("*.resnets.*", "decoder.layers.*"), Kind.RESIDUAL),
        "*.attentions.*": Kind.ATTENTION,
        "decoder.up_blocks.*.[0-9]*": Kind.RESIDUAL,  # of AutoencoderDC
    }
)


def roles(network: nn.Module) -> dict[str, Role]:
    """The role of every layer; the last that is registered makes the image, whatever its name."""
    found = INNER_ROLES(network)
    return found | {[*found][-1]: Role.HEAD}


class Decoded:
    """Output of a decoder, as diffusers' networks return theirs."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Decoder(nn.Module):
    """The parts of an autoencoder that turn latents into images; it shares them, and their names, with the autoencoder.

    Raises:
        ValueError: another class, such as one of videos; a decoder that reads its latents twice.
    """

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder_class, self.config = type(autoencoder).__name__, dict(autoencoder.config)
        if self.autoencoder_class not in AUTOENCODERS:
            known = ", ".join(AUTOENCODERS)
            raise ValueError(
                f"no {self.autoencoder_class} can be quantized, first_stage=float; those that can: {known}"
            )
        if self.config.get("norm_type") == "spatial":
            reason = "with norm_type='spatial' can be quantized, whose blocks read the latents, too"
            raise ValueError(f"no {self.autoencoder_class} {reason}; first_stage=float")
        for name in PARTS:
            if (part := getattr(autoencoder, name, None)) is not None:
                self.add_module(name, part)

    def forward(self, sample: Float[Tensor, "batch channels h w"], timestep: Any = None) -> Decoded:
        """Images [batch, 3, height, width] of latents as the autoencoder's own `decode` has them; no timestep matters."""
        x: Any = sample
        for name, part in self.named_children():
            x = part(x)[0] if name == "quantize" else part(x)
        return Decoded(x)


DECODER = Family(Decoder.__name__, roles, BLOCKS, lambda *_: {})
