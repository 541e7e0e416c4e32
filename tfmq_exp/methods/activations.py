"""How activation quantizers get their ranges."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.reconstruction.loop import ReconstructionContext, reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


class CalibrationBudget(NamedTuple):
    """What a phase of a method costs: calibration samples that it sees, and iterations of learning per unit."""

    samples: int
    iterations: int


@dataclass(frozen=True)
class CalibrateRanges:
    """Show the calibration set to all quantizers at once, with weights already integer and activations still float.

    Batches are drawn from all sampling steps: a range shared by several steps needs that (in the order of the trajectory
    its moving average would forget the early steps), and the temporal features' ranges are exact either way. Where every
    range belongs to one step, the steps stay together, which gives each range the most samples per observation. Sources
    that need no data are shown none.

    Args:
        batch: samples that one observation is made of.
        timesteps: which of the calibration samples.
    """

    batch: int
    timesteps: TimestepPolicy

    def __post_init__(self) -> None:
        check_fields(self, batch=COUNT)

    def effort(self, images: int, calls: int) -> CalibrationBudget:
        """One pass."""
        return CalibrationBudget(self.timesteps.count(images, calls), 0)

    def __call__(self, task: ReconstructionContext) -> None:
        """Set all ranges and switch the quantizers on."""
        self.ranges(task.model, task.data, task.seed, lambda done, of: task.watcher.progress("ranges", done, of))

    @torch.no_grad()
    def ranges(
        self,
        model: QuantizedUNet,
        data: CalibrationSet,
        seed: int,
        each_batch: Callable[[int, int], None] = lambda _done, _of: None,
    ) -> None:
        """The work itself; `each_batch` is told how many samples are done, of how many."""
        sources = [quantizer.source for quantizer in model.activation_quantizers().values()]
        if any(source.needs_data for source in sources):
            data = self.timesteps(data)
            if not all(source.per_step for source in sources if source.needs_data):
                data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
            device = next(model.parameters()).device
            model.set_activations(Mode.OBSERVE)
            with model.naming_activations():
                for start in range(0, len(data), self.batch):
                    part = data[slice(start, start + self.batch)]
                    model(**part.inputs(device))
                    each_batch(start + len(part), len(data))
        model.set_activations(Mode.QUANTIZE)


@dataclass(frozen=True)
class LearnRanges:
    """Observe, then learn what the sources can learn, unit by unit, with integer weights (Q-Diffusion, BRECQ, TDQ).

    Whatever `trainable` yields is learned: a scale, a table of scales, a network. Where a step can choose between
    bit-widths, each width is learned in turn, the widest last; sources with one width take part each time. Zero points
    stay.

    Args:
        observe: how ranges start.
        partition: what a unit is.
        timesteps: which sampling steps the units learn from.
        recipe: iterations, batch, learning rate, objective.
    """

    observe: CalibrateRanges
    partition: Callable[[UNetStructure, frozenset[str]], list[Unit]]
    timesteps: TimestepPolicy
    recipe: ReconstructionConfig

    def effort(self, images: int, calls: int) -> CalibrationBudget:
        """Of one unit."""
        return CalibrationBudget(self.timesteps.count(images, calls), self.recipe.iterations)

    def __call__(self, task: ReconstructionContext) -> None:
        """Set and learn all ranges; the quantizers are on afterwards."""
        model = task.model
        self.observe.ranges(model, task.data, task.seed)
        units = self.partition(task.structure, frozenset(model.plan.sites))
        task = task.on(self.timesteps(task.data))
        if not model.activation_bits():
            reconstruct(task, units, self.recipe)
        for bits in model.activation_bits():
            model.use_bits([bits] * model.context.num_steps)
            reconstruct(replace(task, keeper=task.keeper.part(f"a{bits}")), units, self.recipe)


@dataclass(frozen=True)
class KeepRanges:
    """Activation scales are already what they shall be: they were learned together with the weights."""

    def effort(self, images: int, calls: int) -> CalibrationBudget:
        """None."""
        return CalibrationBudget(0, 0)

    def __call__(self, task: ReconstructionContext) -> None:
        """Switch the quantizers on."""
        task.model.set_activations(Mode.QUANTIZE)
