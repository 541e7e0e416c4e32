"""How weights become integers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.methods.activations import CalibrateRanges, CalibrationBudget
from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.reconstruction.loop import ReconstructionContext, reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit

Partition = Callable[[UNetStructure, frozenset[str]], list[Unit]]


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its grid; no data needed."""

    learns: ClassVar[frozenset[str]] = frozenset()
    trains: ClassVar[Literal[False]] = False  # on images, as quantization-aware training does

    def effort(self, images: int, calls: int) -> CalibrationBudget:
        """None."""
        return CalibrationBudget(0, 0)

    def __call__(self, task: ReconstructionContext) -> None:
        """Freeze every weight."""
        task.model.calibrate_weights()
        for site in task.model.weight_layers():
            task.model.freeze(site)


@dataclass(frozen=True)
class Reconstruct:
    """AdaRound, one unit at a time (BRECQ, arXiv 2102.05426); the partition says what a unit is.

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

    def effort(self, images: int, calls: int) -> CalibrationBudget:
        """Of one unit."""
        return CalibrationBudget(self.timesteps.count(images, calls), self.recipe.iterations)

    def __call__(self, task: ReconstructionContext) -> None:
        """Learn and freeze every weight; those that no unit learns are rounded to nearest, before the others learn."""
        sites = task.model.weight_layers()
        units = self.partition(task.structure, frozenset(sites))
        learned = {site for unit in units for site in unit.sites}
        left = [site for site in sites if site not in learned]
        task.model.calibrate_weights(left)
        for site in left:
            task.model.freeze(site)
        reconstruct(task.on(self.timesteps(task.data)), units, self.recipe)


@dataclass(frozen=True)
class ReconstructJointly(Reconstruct):
    """Weights and activation scales together, with activations quantized meanwhile (QDrop, arXiv 2203.05740).

    Args:
        observe: how activation ranges start, under weights rounded to nearest.
    """

    observe: CalibrateRanges
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})

    def __call__(self, task: ReconstructionContext) -> None:
        """Place the activations' grids, then learn both.

        Raises:
            ValueError: activations with several bit-widths, of which weights could fit only one.
        """
        if widths := task.model.activation_bits():
            raise ValueError(f"weights and scales can be learned together for one activation width, not for {widths}")
        task.model.calibrate_weights()
        with modes(task.model.weight_quantizers(), Mode.QUANTIZE):
            self.observe.ranges(task.model, task.data, derive_seed(task.seed, "activations"))
        super().__call__(task)
