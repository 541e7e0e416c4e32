"""S_N: N ranges, each for an equal part of the training timesteps (TDQ, arXiv 2306.02316, supplement, section 5)."""

from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.scales.base import DEFAULT_OBSERVER
from tfmq_exp.quant.scales.per_step import PerStep
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


class Intervals(PerStep):
    """Timestep t reads range floor(t N / T); N = 1 is one static range. Parts that no step falls into have no entry.

    Args:
        spec: the grid.
        context: the finite set.
        count: N.
        train_timesteps: T, of the schedule that the network was trained on.
        momentum, estimator: see `RunningRange`.

    Raises:
        ValueError: N outside 1 .. T.
    """

    per_step = False

    def __init__(
        self,
        spec: QuantSpec,
        context: TimestepContext,
        *,
        count: int,
        train_timesteps: int,
        momentum: float = 0.0,
        estimator: Observer = DEFAULT_OBSERVER,
    ) -> None:
        if not 1 <= count <= train_timesteps:
            raise ValueError(f"the number of intervals must be 1 to {train_timesteps}, got {count}")
        parts = [t * count // train_timesteps for t in context.timesteps]
        used = sorted(set(parts))
        entries = [used.index(part) for part in parts]
        super().__init__(spec, context, momentum=momentum, estimator=estimator, entry_of_step=entries)
        self.unread = count - len(used)  # parts that no timestep falls into
