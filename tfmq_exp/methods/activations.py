"""Phases that find the ranges of activation quantizers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.core.batches import batches
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.reconstruction.blocks.block_by_block import reconstruct_units
from tfmq_exp.reconstruction.blocks.observe_blocks import observe_blocks
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Partition
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

Progress = Callable[[int, int], None]  # (done, of all)
Observation = Callable[[CalibrationSet, int, Progress], None]  # (calibration set, samples of a pass, progress)


class CalibrationBudget(NamedTuple):
    """Cost of a phase of a method: calibration samples that it sees, and iterations of learning per unit."""

    samples: int
    iterations: int


def observe_network(model: QuantizedNetwork, data: CalibrationSet, batch: int, progress: Progress) -> None:
    """Run the whole network over a set; `progress` is called with the number of samples done, and of all."""
    device = next(model.parameters()).device
    for rows in batches(len(data), batch):
        model(**data[slice(rows.start, rows.stop)].inputs(device))
        progress(rows.stop, len(data))


def observation(context: ReconstructionContext) -> Observation | None:
    """Observation in this context: block by block where the network is not in memory."""
    return partial(observe_blocks, context) if context.stored else None


@dataclass(frozen=True)
class CalibrateRanges:
    """Show the calibration set to all quantizers at once, `batch` samples a time, with integer weights and float activations.

    Batches are drawn from all sampling steps: in the order of the trajectory, the moving average of a range shared by several
    steps would forget the early ones. Where every range belongs to one step, the steps stay together, which gives each range
    the most samples per observation. Scales that need no data see none.
    """

    batch: int
    timesteps: TimestepPolicy

    def __post_init__(self) -> None:
        check_fields(self, batch=COUNT)

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        return CalibrationBudget(self.timesteps.count(images, calls), 0)

    def __call__(self, context: ReconstructionContext) -> None:
        progress = partial(context.progress.on_progress, "ranges")
        self.ranges(context.model, context.data, context.seed, progress, observation(context))

    @torch.no_grad()
    def ranges(
        self,
        model: QuantizedNetwork,
        data: CalibrationSet,
        seed: int,
        progress: Progress = lambda _done, _total: None,
        observe: Observation | None = None,
    ) -> None:
        """Set all ranges and switch the quantizers on; weights are integers, or rounded to nearest.

        Args:
            model: quantized network.
            data: calibration set.
            seed: of the samples' order.
            progress: called with what is done, and with all there is to do.
            observe: shows a set to the quantizers; by default, passes of the whole network do.
        """
        sources = [quantizer.scale_provider for quantizer in model.activation_quantizers().values()]
        if any(source.needs_data for source in sources):
            data = self.timesteps(data)
            if not all(source.per_step for source in sources if source.needs_data):
                data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
            model.set_activations(Mode.OBSERVE)
            with model.naming_activations():
                (observe or partial(observe_network, model))(data, self.batch, progress)
        model.set_activations(Mode.QUANTIZE)


@dataclass(frozen=True)
class LearnRanges:
    """Calibrate ranges, then learn them unit by unit with integer weights (Q-Diffusion, BRECQ, TDQ).

    All trainable parameters of activation scales are learned: a scale, a table of scales, a network; `observe` is how they
    start. Where a step can choose between bit-widths, each width is learned in turn, the widest last; scales with one width
    take part each time. Zero points stay.
    """

    observe: CalibrateRanges
    partition: Partition
    timesteps: TimestepPolicy
    recipe: ReconstructionConfig

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        return CalibrationBudget(self.timesteps.count(images, calls), self.recipe.iterations)

    def __call__(self, context: ReconstructionContext) -> None:
        model = context.model
        self.observe.ranges(model, context.data, context.seed, observe=observation(context))
        units = self.partition(context.structure, frozenset(model.plan.layers))
        context = replace(context, data=self.timesteps(context.data))
        if not model.activation_bits():
            reconstruct_units(context, units, self.recipe)
        for bits in model.activation_bits():
            model.use_bits([bits] * model.context.num_steps)
            reconstruct_units(
                replace(context, checkpointer=context.checkpointer.scoped(f"a{bits}")), units, self.recipe
            )


@dataclass(frozen=True)
class KeepRanges:
    """Activation scales were learned together with the weights: only switch the quantizers on."""

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        return CalibrationBudget(0, 0)

    def __call__(self, context: ReconstructionContext) -> None:
        context.model.set_activations(Mode.QUANTIZE)
