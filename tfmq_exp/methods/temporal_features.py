"""Temporal features of the quantized network: computed by its layers, or cached for every sampling step."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tfmq_exp.core.validate import Kind, check_fields, one_of, whole
from tfmq_exp.denoisers.structure import Role, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.quant.layers import cached
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

BITS = Kind("a whole number from 2 to 8", lambda value: whole(value) and 2 <= value <= 8)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeFeatures:
    """The quantized Temporal Information Block computes them at every step (TFMQ-DM and everything before it)."""

    def __call__(self, model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> None: ...


@dataclass(frozen=True)
class CacheFeatures:
    """Store the float features of every sampling step in quantized form (Temporal Feature Matters, arXiv 2407.19547).

    The paper's text was not at hand. Assumed: one min-max grid per step and layer, at the activations' bit-width; and
    "disturbance-aware selection" keeps, layer by layer, whichever of the stored feature and the quantized block's own has the
    smaller mean relative error over the finite set. When no layer computes its feature any more, the time embedding
    goes too.
    """

    bits: int  # of a stored feature
    select: Literal["disturbance", "always"]  # `disturbance` for the selection, `always` to store every feature

    def __post_init__(self) -> None:
        check_fields(self, bits=BITS, select=one_of("disturbance", "always"))

    @torch.no_grad()
    def __call__(self, model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> None:
        t = torch.tensor(model.context.timesteps, device=next(float_unet.parameters()).device)
        block = TemporalInformationBlock(float_unet, structure)
        with model.context.at(t):
            computed = TemporalInformationBlock(model.unet, structure)(t)
        count = 0
        for layer, exact, feature in zip(block.names, block(t), computed, strict=True):
            stored = cached(exact, self.bits)
            if self.select == "always" or disturbance(stored.dequantize(), exact) < disturbance(feature, exact):
                model.cache_feature(layer, stored)
                count += 1
        total = len(block.names)
        log.info("%d of %d temporal features are stored, %d computed", count, total, total - count)
        if count == total:
            for layer in structure.by_role(Role.TIME_EMBED):
                model.drop(layer.name)


def disturbance(feature: Tensor, exact: Tensor) -> Tensor:
    """Mean over the timesteps of a feature's squared error relative to the exact one."""
    return ((feature - exact).square().mean(1) / exact.square().mean(1)).mean()
