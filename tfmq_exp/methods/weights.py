"""Phases that turn weights into integers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.methods.activations import CalibrateRanges, CalibrationBudget
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Partition


@dataclass(frozen=True)
class RoundToNearest:
    """Round every weight to the nearest integer; needs no data."""

    learns: ClassVar[frozenset[str]] = frozenset()
    trains: ClassVar[Literal[False]] = False  # on images, as quantization-aware training does

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        return CalibrationBudget(0, 0)

    def __call__(self, context: ReconstructionContext) -> None:
        context.model.calibrate_weights()
        for layer in context.model.weight_layers():
            context.model.freeze(layer)


@dataclass(frozen=True)
class Reconstruct:
    """AdaRound, one unit at a time (BRECQ, arXiv 2102.05426). Weights that no unit learns are rounded to nearest first.

    Args:
        partition: `Blockwise` (BRECQ), `TemporalAware` (TFMQ-DM's TIAR) or `TemporalFrozen`.
        timesteps: which sampling steps the units learn from.
        recipe: iterations, batch, learning rate, objective.
    """

    partition: Partition
    timesteps: TimestepPolicy
    recipe: ReconstructionConfig
    learns: ClassVar[frozenset[str]] = frozenset({"weights"})
    trains: ClassVar[Literal[False]] = False

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        return CalibrationBudget(self.timesteps.count(images, calls), self.recipe.iterations)

    def __call__(self, context: ReconstructionContext) -> None:
        model = context.model
        layers = model.weight_layers()
        units = self.partition(context.structure, frozenset(layers))
        learned = {layer for unit in units for layer in unit.layers}
        rest = [layer for layer in layers if layer not in learned]
        model.calibrate_weights(rest)
        for layer in rest:
            model.freeze(layer)
        reconstruct(context.on(self.timesteps(context.data)), units, self.recipe)


@dataclass(frozen=True)
class ReconstructJointly(Reconstruct):
    """Weights and activation scales together, with activations quantized meanwhile (QDrop, arXiv 2203.05740).

    Args:
        observe: how activation ranges start, under weights rounded to nearest.

    Raises:
        ValueError: activations with several bit-widths, of which weights could fit only one.
    """

    observe: CalibrateRanges
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})

    def __call__(self, context: ReconstructionContext) -> None:
        model = context.model
        if widths := model.activation_bits():
            raise ValueError(f"weights and scales can be learned together for one activation width, not for {widths}")
        model.calibrate_weights()
        with modes(model.weight_quantizers(), Mode.QUANTIZE):
            self.observe.ranges(model, context.data, derive_seed(context.seed, Stream.ACTIVATIONS))
        super().__call__(context)
