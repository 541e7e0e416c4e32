"""Callbacks of a learning phase: progress bar, loss curves, unit checkpoints and reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfmq_exp.core.finite import naming_rates
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.pipeline import Advance, Pipeline
from tfmq_exp.pipeline.unit_checkpoints import FileUnitCheckpointer, LossCurve
from tfmq_exp.reconstruction.context import UnitReport


class LoggingCallback:
    """Shows a phase on a progress bar and its loss curves, one for each unit and pass over the units, in a logger.

    `shown` names the curves that the logger has got; `curves` are those of the present pass, by unit.
    """

    def __init__(self, advance: Advance, logger: Logger, phase: str) -> None:
        self.advance, self.logger, self.phase = advance, logger, phase
        self.finished_units, self.total, self.passes = 0, 0, 0
        self.curves: dict[str, LossCurve] = {}
        self.shown: set[str] = set()

    def on_start(self, units: int) -> None:
        """Begin a pass over so many units."""
        self.finished_units, self.total = 0, units
        self.passes += 1
        self.curves.clear()

    def on_progress(self, name: str, done: int, total: int) -> None:
        """Show work that has no units and no loss."""
        self.advance(done / total, name)

    def on_iteration_end(self, unit: str, iteration: int, iterations: int, loss: float) -> None:
        """Show the loss of an iteration of a unit.

        Args:
            unit: its name.
            iteration: number of iterations so far, from 1.
            iterations: of the unit altogether.
            loss: of this iteration, without the rounding penalty.
        """
        self.advance((self.finished_units + iteration / iterations) / self.total, f"{unit}  loss {loss:.2e}")
        again = f" {self.passes}" if self.passes > 1 else ""
        curve = self.curves.setdefault(unit, LossCurve(f"{self.phase}{again}", unit))
        if curve.add(iteration, iterations, loss):
            self.shown.add(f"{curve.phase}/{unit}")
            self.logger.log_loss(f"{curve.phase}/{unit}", iteration, loss)

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        """Show the errors of a unit; no report: it was learned by an earlier attempt."""
        self.finished_units += 1
        note = "kept from before" if report is None else f"{report.error_before:.2e} → {report.error_after:.2e}"
        self.advance(self.finished_units / self.total, f"{unit}  {note}")


@contextmanager
def learning(
    pipeline: Pipeline, phase: str, folder: Path, title: str = ""
) -> Iterator[tuple[FileUnitCheckpointer, LoggingCallback]]:
    """Unit checkpoints and progress callback of a phase; `units.json` and `losses.json` are written afterwards.

    Args:
        pipeline: with progress display and logger.
        phase: `weights` or `activations`, the part of the method that errors name.
        folder: of the stage.
        title: of the bar, if it is not the phase.
    """
    with pipeline.progress(title or phase, 1) as advance:
        callback = LoggingCallback(advance, pipeline.logger, phase)
        units = FileUnitCheckpointer(folder / "units", callback.curves, pipeline.store.write)
        with naming_rates(f"method.{phase}"):
            yield units, callback
    pipeline.shown_losses |= callback.shown
    if pipeline.group.is_main:
        units.write_reports(folder)
