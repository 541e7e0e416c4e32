"""Mirrors of what a run writes. Files are always written; wandb shows the same on request."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tfmq_exp.experiment.store import write_atomically

Rows = Sequence[Mapping[str, Any]]


def write_csv(path: Path, rows: Rows) -> None:
    """Rows with the same keys, as CSV."""

    def write(target: Path) -> None:
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


class Mirror(Protocol):
    """Shows a run somewhere else than in its folder."""

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """One point of a unit's loss curve."""
        ...

    def table(self, name: str, rows: Rows) -> None:
        """A table."""
        ...

    def image(self, name: str, path: Path) -> None:
        """A picture."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run is over."""
        ...


class NoMirror:
    """Files only."""

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """Nothing."""

    def table(self, name: str, rows: Rows) -> None:
        """Nothing."""

    def image(self, name: str, path: Path) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self, *, failed: bool) -> None:
        """Nothing."""


def no_mirror(**_: Any) -> NoMirror:
    """Files only; takes and ignores what other mirrors need."""
    return NoMirror()


class WandbMirror:
    """Weights & Biases. `offline` needs no account; `wandb sync` uploads it later."""

    def __init__(
        self, project: str, mode: str, folder: Path, name: str, settings: Mapping[str, Any], group: str
    ) -> None:
        import wandb

        if mode not in ("online", "offline"):
            raise ValueError(f"logger.mode must be online or offline, got {mode!r}")
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            mode=mode,
            dir=folder,
            name=name,
            config=dict(settings),
            group=group or None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("reconstruction/iteration")
        self.run.define_metric("reconstruction/*", step_metric="reconstruction/iteration")

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """Each unit has its own curve over its own iterations."""
        self.run.log({f"reconstruction/{unit}": value, "reconstruction/iteration": iteration})

    def table(self, name: str, rows: Rows) -> None:
        """A wandb table."""
        if rows:
            columns: list[Any] = list(rows[0])
            self.run.log({name: self.wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])})

    def image(self, name: str, path: Path) -> None:
        """A wandb image."""
        self.run.log({name: self.wandb.Image(str(path))})

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's summary."""
        self.run.summary.update(dict(values))

    def close(self, *, failed: bool) -> None:
        """Finish, marking a failed run."""
        self.run.finish(exit_code=int(failed))
