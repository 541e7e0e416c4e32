"""Weights & Biases as a mirror."""

import os
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.files import write_atomically
from tfmq_exp.tracking.mirror import Points, Rows, RunCard

MODES = ("offline", "online")


@dataclass(frozen=True)
class Wandb:
    """The choice of Weights & Biases.

    Args:
        project: where runs are shown together.
        mode: offline needs neither account nor network (`wandb sync` uploads later); online needs both.
        entity: the user or team that owns the project; None for the account's own.
        group: the name that runs are grouped by; None for the sweep's.

    Raises:
        ValueError: another mode.
    """

    project: str
    mode: str = "offline"
    entity: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"logger mode must be {' or '.join(MODES)}, got {self.mode!r}")

    def open(self, run: RunCard) -> "WandbMirror":
        """Start the run, or go on with it where its folder has an identity.

        Raises:
            RuntimeError: online without credentials; nothing is asked for on the terminal.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports go out over the network, offline as well
        import wandb

        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "logger mode online needs an account: run `wandb login` or set WANDB_API_KEY; offline needs none"
            )
        started = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,  # type: ignore[arg-type]
            dir=run.folder,
            id=identity(run.folder),
            resume="allow" if self.mode == "online" else None,  # offline the same id is enough
            name=run.name,
            group=self.group or run.group,
            job_type=run.kind,
            tags=run.tags,
            config={**run.settings, "choices": dict(run.choices)},
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        return WandbMirror(started)


def identity(folder: Path) -> str:
    """The run's id in Weights & Biases, kept in its folder from the first time on."""
    kept = folder / "wandb.id"
    if not kept.is_file():
        write_atomically(kept, lambda path: path.write_text(uuid.uuid4().hex[:16], encoding="utf-8"))
    return kept.read_text(encoding="utf-8")


class WandbMirror:
    """A started run.

    It gets `loss/<phase>/<unit>` against `iteration`, other curves against their own axis, `tables/`, `images/`, a summary.
    A resumed run logs all of it again, so that every offline folder is whole.
    """

    def __init__(self, run: Any) -> None:
        self.run, self.folder = run, Path(run.dir).parent  # its files lie in `files` there
        run.define_metric("iteration", hidden=True, summary="none")
        run.define_metric("loss/*", step_metric="iteration", summary="none")

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """Each unit has its own curve over its own iterations; dots become slashes, as no pattern of metrics matches dots."""
        self.run.log({f"loss/{unit.replace('.', '/')}": value, "iteration": iteration})

    def curve(self, name: str, axis: str, points: Points) -> None:
        """The axis is a metric, against which the curves of many runs can be laid over each other."""
        self.run.define_metric(axis, hidden=True, summary="none")
        self.run.define_metric(f"{name}/*", step_metric=axis, summary="none")
        for place, values in points:
            self.run.log({axis: place, **{f"{name}/{key}": value for key, value in values.items()}})

    def table(self, name: str, rows: Rows) -> None:
        """A wandb table."""
        import wandb

        if rows:
            columns: list[Any] = list(rows[0])
            data = [[row[column] for column in columns] for row in rows]
            self.run.log({f"tables/{name}": wandb.Table(columns=columns, data=data)})

    def image(self, name: str, path: Path) -> None:
        """A wandb image."""
        import wandb

        self.run.log({f"images/{name}": wandb.Image(str(path))})

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's summary."""
        self.run.summary.update(dict(values))

    def close(self, *, failed: bool) -> None:
        """Finish, marking a failed run."""
        self.run.finish(exit_code=int(failed))

    def where(self) -> list[str]:
        """The page of the run, or the folder that can become one."""
        if self.run.offline:
            return [f"Weights & Biases, offline: upload it with: wandb sync {shlex.quote(str(self.folder))}"]
        return [f"Weights & Biases: {self.run.url}"]
