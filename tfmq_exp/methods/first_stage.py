"""Quantization of a first stage's decoder by the choices of a method: block reconstruction without a timestep."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.core.validate import Checked, one_of
from tfmq_exp.denoisers.families.decoder import Decoder
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.methods.method import Method
from tfmq_exp.methods.weights import RoundToNearest
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.reconstruction.context import ComputeConfig, ProgressCallback, ReconstructionContext, UnitCheckpointer
from tfmq_exp.surgery.config import INPUT_BITS, WEIGHT_BITS, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import ResolvedConfig, resolve

ONE_STEP = (0,)  # the finite set of a network that knows no timestep
STATIC = ScalePlan(StaticConfig(), StaticConfig())


@dataclass(frozen=True)
class FirstStageBits(Checked):
    """Bits of a decoder's weights and of its layers' inputs. The first and the last layers keep 8-bit weights.

    Inputs of the first layers are the latents themselves, whose largest value no calibration shows; they stay float.
    """

    name: str
    weight: Annotated[int, one_of(*WEIGHT_BITS)]
    activation: Annotated[int, one_of(*INPUT_BITS)]

    def resolved(self, decoder: Decoder, latent: Float[Tensor, "1 ..."]) -> ResolvedConfig:
        """Quantizers of every layer."""
        roles = {role.value: LayerBits(self.weight, self.activation) for role in Role}
        roles |= {Role.STEM.value: LayerBits(8), Role.HEAD.value: LayerBits(8, self.activation)}
        structure = read_structure(decoder, calibration_set(latent).inputs(latent.device))
        return resolve(QuantizationConfig(roles), structure, (), STATIC, ONE_STEP)


def calibration_set(latents: Float[Tensor, "samples ..."]) -> CalibrationSet:
    """Inputs of an autoencoder's `decode` as the one step of a sampler."""
    zeros = torch.zeros(len(latents), dtype=torch.long)
    return CalibrationSet(latents.cpu(), zeros, zeros, torch.arange(len(latents)))


@dataclass(frozen=True)
class DecoderCalibration:
    """Data, method and resources that a decoder is quantized with.

    Args:
        latents: inputs of the autoencoder's `decode`.
        method: of the denoiser, whose choices for weights and ranges count here, too. Training would need
            the decoder's own images: its weights are rounded to nearest instead.
        compute: resources.
        seed: of all random numbers.
    """

    latents: Float[Tensor, "samples ..."]
    method: Method
    compute: ComputeConfig
    seed: int

    def quantize(
        self, decoder: Decoder, bits: FirstStageBits, checkpointer: UnitCheckpointer, progress: ProgressCallback
    ) -> QuantizedNetwork:
        """A quantized copy of a decoder: integer weights and one range for each activation."""
        method, device = self.method, next(decoder.parameters()).device
        plan = bits.resolved(decoder, self.latents[:1].to(device))
        data = calibration_set(self.latents)
        model = build_quantized_network(decoder, plan, method.weight_observer)
        structure = read_structure(decoder, data[:1].inputs(device))
        context = ReconstructionContext(
            *(model, decoder, structure, data, self.compute, self.seed), checkpointer, progress
        )
        weights, activations = method.weights, method.activations
        if weights.trains is True:
            weights, activations = RoundToNearest(), CalibrateRanges(64, EveryKth())
        weights(context)
        activations(replace(context, checkpointer=checkpointer.scoped("activations")))
        model.tabulate_scales()
        return model


@torch.no_grad()
def decoded_pairs(
    model: nn.Module, decoder: nn.Module, latents: Float[Tensor, "samples ..."], rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images around [-1, 1] of the same latents by two decoders, `rows` at a time."""
    device = next(decoder.parameters()).device
    for part in latents.split(rows):
        given = calibration_set(part).inputs(device)
        yield model(**given).sample, decoder(**given).sample
