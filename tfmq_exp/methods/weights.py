"""How weights become integers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.methods.activations import Effort, Observe
from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.reconstruction.module import Recipe
from tfmq_exp.reconstruction.partition import Unit
from tfmq_exp.reconstruction.report import Keeper, Watcher
from tfmq_exp.reconstruction.run import Means, reconstruct
from tfmq_exp.sampling.seeds import derive_seed
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

Partition = Callable[[Anatomy, frozenset[str]], list[Unit]]


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its grid; no data needed."""

    learns: ClassVar[frozenset[str]] = frozenset()

    def effort(self, data: CalibrationSet) -> Effort:
        """None."""
        return Effort(0, 0)

    def __call__(
        self,
        model: QuantizedUNet,
        float_unet: nn.Module,
        anatomy: Anatomy,
        data: CalibrationSet,
        means: Means,
        seed: int,
        keeper: Keeper,
        watcher: Watcher,
    ) -> None:
        """Freeze every weight."""
        model.place_weight_grids()
        for site in model.weight_sites():
            model.freeze(site)


@dataclass(frozen=True)
class Reconstruct:
    """AdaRound, one unit at a time (BRECQ, arXiv 2102.05426); the partition says what a unit is.

    Args:
        partition: `Blockwise` (BRECQ) or `TemporalAware` (TFMQ-DM's TIAR).
        timesteps: which sampling steps the units learn from.
        recipe: iterations, batch, learning rate, objective.
    """

    partition: Partition
    timesteps: TimestepPolicy
    recipe: Recipe
    learns: ClassVar[frozenset[str]] = frozenset({"weights"})

    def effort(self, data: CalibrationSet) -> Effort:
        """Of one unit."""
        return Effort(len(self.timesteps(data)), self.recipe.iterations)

    def __call__(
        self,
        model: QuantizedUNet,
        float_unet: nn.Module,
        anatomy: Anatomy,
        data: CalibrationSet,
        means: Means,
        seed: int,
        keeper: Keeper,
        watcher: Watcher,
    ) -> None:
        """Learn and freeze every weight."""
        units, kept = self.partition(anatomy, frozenset(model.weight_sites())), self.timesteps(data)
        reconstruct(model, float_unet, anatomy, units, kept, self.recipe, means, seed, keeper, watcher)


@dataclass(frozen=True)
class ReconstructJointly(Reconstruct):
    """Weights and activation scales together, with activations quantized meanwhile (QDrop, arXiv 2203.05740).

    Args:
        observe: how activation ranges start, under weights rounded to nearest.
    """

    observe: Observe
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})

    def __call__(
        self,
        model: QuantizedUNet,
        float_unet: nn.Module,
        anatomy: Anatomy,
        data: CalibrationSet,
        means: Means,
        seed: int,
        keeper: Keeper,
        watcher: Watcher,
    ) -> None:
        """Place the activations' grids, then learn both."""
        model.place_weight_grids()
        with modes(model.weight_quantizers(), Mode.QUANTIZE):
            self.observe.ranges(model, data, derive_seed(seed, "activations"))
        super().__call__(model, float_unet, anatomy, data, means, seed, keeper, watcher)
