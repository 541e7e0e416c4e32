"""How weights become integers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.methods.activations import Effort, Observe
from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.reconstruction.module import Recipe
from tfmq_exp.reconstruction.partition import Unit
from tfmq_exp.reconstruction.run import Task, reconstruct
from tfmq_exp.sampling.seeds import derive_seed

Partition = Callable[[Anatomy, frozenset[str]], list[Unit]]


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its grid; no data needed."""

    learns: ClassVar[frozenset[str]] = frozenset()
    data: ClassVar[str] = "trajectories"  # what there is to learn from: these of the float model, or images

    def effort(self, images: int, calls: int) -> Effort:
        """None."""
        return Effort(0, 0)

    def __call__(self, task: Task) -> None:
        """Freeze every weight."""
        task.model.place_weight_grids()
        for site in task.model.weight_sites():
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
    recipe: Recipe
    learns: ClassVar[frozenset[str]] = frozenset({"weights"})
    data: ClassVar[str] = "trajectories"

    def effort(self, images: int, calls: int) -> Effort:
        """Of one unit."""
        return Effort(self.timesteps.count(images, calls), self.recipe.iterations)

    def __call__(self, task: Task) -> None:
        """Learn and freeze every weight; those that no unit learns are rounded to nearest, before the others learn."""
        sites = task.model.weight_sites()
        units = self.partition(task.anatomy, frozenset(sites))
        learned = {site for unit in units for site in unit.sites}
        left = [site for site in sites if site not in learned]
        task.model.place_weight_grids(left)
        for site in left:
            task.model.freeze(site)
        reconstruct(task.on(self.timesteps(task.data)), units, self.recipe)


@dataclass(frozen=True)
class ReconstructJointly(Reconstruct):
    """Weights and activation scales together, with activations quantized meanwhile (QDrop, arXiv 2203.05740).

    Args:
        observe: how activation ranges start, under weights rounded to nearest.
    """

    observe: Observe
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})

    def __call__(self, task: Task) -> None:
        """Place the activations' grids, then learn both.

        Raises:
            ValueError: activations with several bit-widths, of which weights could fit only one.
        """
        if widths := task.model.activation_bits():
            raise ValueError(f"weights and scales can be learned together for one activation width, not for {widths}")
        task.model.place_weight_grids()
        with modes(task.model.weight_quantizers(), Mode.QUANTIZE):
            self.observe.ranges(task.model, task.data, derive_seed(task.seed, "activations"))
        super().__call__(task)
