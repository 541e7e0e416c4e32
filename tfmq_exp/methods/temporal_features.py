"""How temporal features are kept near the float network's after quantization, beyond learning them."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tfmq_exp.core.validate import Kind, check_fields, whole
from tfmq_exp.denoisers.structure import Role, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.temporal_cache import cached

BITS = Kind("a whole number from 2 to 8", lambda value: whole(value) and 2 <= value <= 8)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeFeatures:
    """The quantized Temporal Information Block computes them at every step (TFMQ-DM and everything before it)."""

    def __call__(self, model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class CacheFeatures:
    """Store the float features of every sampling step in quantized form (Temporal Feature Matters, arXiv 2407.19547).

    The paper's text was not at hand. Assumed: one min-max grid per step and layer, at the activations' bit-width; and
    "disturbance-aware selection" keeps, layer by layer, whichever of the stored feature and the quantized block's own has the
    smaller mean relative error over the finite set. When no layer computes its feature any more, the time embedding
    goes too.

    Args:
        bits: of a stored feature.
        select: `disturbance` for the selection, `always` to store every feature.
    """

    bits: int
    select: Literal["disturbance", "always"]

    def __post_init__(self) -> None:
        check_fields(self, bits=BITS)
        if self.select not in ("disturbance", "always"):
            raise ValueError(f"select must be disturbance or always, got {self.select!r}")

    @torch.no_grad()
    def __call__(self, model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> None:
        """Replace embedding projections by tables."""
        t = torch.tensor(model.context.timesteps, device=next(float_unet.parameters()).device)
        block = TemporalInformationBlock(float_unet, structure)
        with model.context.at(t):
            computed = TemporalInformationBlock(model.unet, structure)(t)
        chosen = []
        for site, wanted, own in zip(block.names, block(t), computed, strict=True):
            stored = cached(wanted, self.bits)
            disturbance = [
                ((f - wanted).square().mean(1) / wanted.square().mean(1)).mean() for f in (stored.dequantize(), own)
            ]
            if self.select == "always" or disturbance[0] < disturbance[1]:
                model.cache_feature(site, stored)
                chosen.append(site)
        log.info(
            "%d of %d temporal features are stored, %d computed",
            len(chosen),
            len(block.names),
            len(block.names) - len(chosen),
        )
        if len(chosen) == len(block.names):
            for site in structure.by_role(Role.TIME_EMBED):
                model.drop(site.name)
