"""How weights become integers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.reconstruction.module import Recipe
from tfmq_exp.reconstruction.partition import Unit
from tfmq_exp.reconstruction.run import Keeper, Means, Watcher, reconstruct
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its grid; no data needed."""

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

    partition: Callable[[Anatomy, frozenset[str]], list[Unit]]
    timesteps: EveryKth
    recipe: Recipe

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
        kept = self.timesteps(data)
        reconstruct(model, float_unet, anatomy, self.partition, kept, self.recipe, means, seed, keeper, watcher)
