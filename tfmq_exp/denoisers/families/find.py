"""The families that are known, and that of a network."""

from torch import nn

from tfmq_exp.denoisers.families.adaln_single import LTX, PIXART, SANA, WAN
from tfmq_exp.denoisers.families.adaln_zero import AURAFLOW, COGVIDEOX, FLUX, FLUX2, LUMINA2, QWEN_IMAGE, SD3
from tfmq_exp.denoisers.families.chroma import CHROMA
from tfmq_exp.denoisers.families.decoder import DECODER
from tfmq_exp.denoisers.families.dit import DIT
from tfmq_exp.denoisers.families.family import Family
from tfmq_exp.denoisers.families.hunyuan import HUNYUAN_DIT, HUNYUAN_VIDEO
from tfmq_exp.denoisers.families.unet import CONDITIONAL_UNET, UNET

FAMILIES = (
    *(UNET, CONDITIONAL_UNET, DIT, PIXART, SANA, WAN, LTX),
    *(SD3, FLUX, FLUX2, QWEN_IMAGE, AURAFLOW, LUMINA2, COGVIDEOX, CHROMA, HUNYUAN_VIDEO, HUNYUAN_DIT),
)


def family_of(network: nn.Module) -> Family:
    """The family of a denoiser of diffusers, or of a `Decoder`; ValueError for a class that is not known."""
    known = {family.network: family for family in FAMILIES}
    name = type(network).__name__
    if name == DECODER.network:
        return DECODER
    if name not in known:
        raise ValueError(f"a {name} is a denoiser of no known family; known: {', '.join(known)}")
    return known[name]
