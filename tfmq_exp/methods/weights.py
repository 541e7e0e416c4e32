"""Phases that turn weights into integers, or train them to become some."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.methods.activations import CalibrateRanges, CalibrationBudget
from tfmq_exp.qat.conditioning import Labels
from tfmq_exp.qat.module import TrainingProtocol
from tfmq_exp.qat.train import TrainingContext, train
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.reconstruction.blocks.block_by_block import reconstruct_units
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Partition


@dataclass(frozen=True)
class RoundToNearest:
    """Round every weight to the nearest integer; needs no data."""

    learns: ClassVar[frozenset[str]] = frozenset()
    trains: ClassVar[Literal[False]] = False  # on images, as quantization-aware training does
    in_parts: ClassVar[bool] = True  # the network need not be whole in memory

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        return CalibrationBudget(0, 0)

    def __call__(self, context: ReconstructionContext) -> None:
        if context.stored:
            return  # what nothing learns is rounded whenever it is loaded
        context.model.calibrate_weights()
        for layer in context.model.weight_layers():
            context.model.freeze(layer)


@dataclass(frozen=True)
class Reconstruct:
    """AdaRound, GPTQ or both, one unit at a time (BRECQ, arXiv 2102.05426). Weights that no unit learns are rounded to nearest first.

    Partitions are `Blockwise` (BRECQ), `TemporalAware` (TFMQ-DM's TIAR) and `TemporalFrozen`.
    """

    partition: Partition
    timesteps: TimestepPolicy
    recipe: ReconstructionConfig
    learns: ClassVar[frozenset[str]] = frozenset({"weights"})
    trains: ClassVar[Literal[False]] = False

    @property
    def in_parts(self) -> bool:
        """Whether the network need not be whole in memory."""
        return self.learns == {"weights"} and not self.recipe.objective.needs_network

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        iterations = self.recipe.iterations if self.recipe.learns else 0
        return CalibrationBudget(self.timesteps.count(images, calls), iterations)

    def __call__(self, context: ReconstructionContext) -> None:
        model = context.model
        units = self.partition(context.structure, frozenset(model.weight_layers()))
        learned = {layer for unit in units for layer in unit.layers}
        rest = [layer for layer in model.weight_layers() if layer not in learned and context.stored is None]
        model.calibrate_weights(rest)
        for layer in rest:
            model.freeze(layer)
        reconstruct_units(replace(context, data=self.timesteps(context.data)), units, self.recipe)


@dataclass(frozen=True)
class ReconstructJointly(Reconstruct):
    """Weights and activation scales together, with activations quantized meanwhile (QDrop, arXiv 2203.05740).

    `observe` is how activation ranges start, under weights rounded to nearest.

    Raises:
        ValueError: activations with several bit-widths, of which weights could fit only one; a network that is not in memory.
    """

    observe: CalibrateRanges
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})

    def __call__(self, context: ReconstructionContext) -> None:
        model = context.model
        if context.stored:
            raise ValueError(
                "weights and scales are learned together in a network that is in memory, not block by block"
            )
        if widths := model.activation_bits():
            raise ValueError(f"weights and scales can be learned together for one activation width, not for {widths}")
        model.calibrate_weights()
        with modes(model.weight_quantizers(), Mode.QUANTIZE):
            self.observe.ranges(model, context.data, derive_seed(context.seed, Stream.ACTIVATIONS))
        super().__call__(context)


@dataclass(frozen=True)
class QuantizationAwareTrain:
    """Quantization-aware training: the denoiser's own training goes on, with quantizers in the network (TDQ, arXiv 2306.02316).

    It learns weights and ranges together. `labels` are classes or captions of the images; None for unconditional networks.
    """

    protocol: TrainingProtocol
    labels: Labels | None
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})
    trains: ClassVar[Literal[True]] = True

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        """Training images, counted as often as they are seen, and iterations."""
        return CalibrationBudget(self.protocol.batch * self.protocol.iterations, self.protocol.iterations)

    def __call__(self, context: TrainingContext) -> None:
        train(context, self.protocol)
