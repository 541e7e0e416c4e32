"""Weights & Biases as a mirror."""

import os
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.core.files import write_atomically
from tfmq_exp.loggers.base import Logger, NullLogger, Points, Rows, RunMetadata

MODES = ("offline", "online", "disabled")
OLDER = {"dryrun": "offline", "run": "online", "": "offline"}  # what WANDB_MODE may also say
OWN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_CONSOLE")  # variables that a run decides itself: it goes on as what it is


@dataclass(frozen=True)
class Wandb:
    """The choice of Weights & Biases.

    Args:
        project: where runs are shown together.
        mode: offline needs neither account nor network (`wandb sync` uploads later); online needs both; disabled writes
            nothing, and so does a `WANDB_DISABLED` in the environment.
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
        if self.chosen not in MODES:
            source = ", from WANDB_MODE" if os.environ.get("WANDB_MODE") == self.mode else ""
            raise ValueError(f"logger mode must be {' or '.join(MODES)}, got {self.mode!r}{source}")

    @property
    def chosen(self) -> str:
        """The mode under its name of today."""
        return OLDER.get(self.mode, self.mode)

    def open(self, run: RunMetadata) -> Logger:
        """Start the run, or go on with it where its folder has an identity.

        Its folder, name and tags may be given by wandb's own `WANDB_DIR`, `WANDB_NAME` and `WANDB_TAGS`.

        Raises:
            RuntimeError: online without credentials; nothing is asked for on the terminal.
        """
        if switch := switched_off(self.chosen):
            return Disabled(switch)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports go out over the network, offline as well
        import wandb

        if self.chosen == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "logger mode online needs an account: run `wandb login` or set WANDB_API_KEY; offline needs none"
            )
        started = wandb.init(
            project=self.project or None,
            entity=self.entity,
            mode=self.chosen,  # type: ignore[arg-type]
            dir=os.environ.get("WANDB_DIR") or run.folder,
            id=identity(run.folder),
            resume="allow" if self.chosen == "online" else None,  # offline the same id is enough
            name=os.environ.get("WANDB_NAME") or run.name,
            group=self.group or run.group,
            job_type=run.kind,
            tags=(*run.tags, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))),
            config={**run.settings, "choices": dict(run.choices)},
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        return WandbLogger(started, not_followed(self.chosen))


def switched_off(mode: str) -> str:
    """What says that nothing is to be written; empty if nothing does."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "WANDB_DISABLED"
    if mode == "disabled":
        return "WANDB_MODE" if os.environ.get("WANDB_MODE") == mode else "logger.mode"
    return ""


def not_followed(mode: str) -> list[str]:
    """Lines on variables of the environment that ask for something else than what is done."""
    asked = OLDER.get(os.environ.get("WANDB_MODE", mode), os.environ.get("WANDB_MODE", mode))
    above = [f"logger.mode={mode} stands above WANDB_MODE={asked}"] if asked != mode else []
    own = [name for name in OWN if os.environ.get(name)]
    return above + ([f"not followed: {', '.join(own)}; a run goes on under the id in its folder"] if own else [])


class Disabled(NullLogger):
    """No mirror, which says why."""

    def __init__(self, switch: str) -> None:
        self.switch = switch

    def where(self) -> list[str]:
        """Nowhere else, as was asked for."""
        return [f"Weights & Biases: nothing written, {self.switch} switches it off"]


def identity(folder: Path) -> str:
    """The run's id in Weights & Biases, kept in its folder from the first time on."""
    kept = folder / "wandb.id"
    if not kept.is_file():
        write_atomically(kept, lambda path: path.write_text(uuid.uuid4().hex[:16], encoding="utf-8"))
    return kept.read_text(encoding="utf-8")


class WandbLogger:
    """A started run.

    It gets `loss/<phase>/<unit>` against `iteration`, other curves against their own axis, `tables/`, `images/`, a summary.
    A resumed run logs all of it again, so that every offline folder is whole.
    """

    def __init__(self, run: Any, remarks: Sequence[str] = ()) -> None:
        self.run, self.folder, self.remarks = run, Path(run.dir).parent, remarks  # its files lie in `files` there
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
            place = f"Weights & Biases, offline: upload it with: wandb sync {shlex.quote(str(self.folder))}"
        else:
            place = f"Weights & Biases: {self.run.url}"
        return [place, *(f"Weights & Biases: {remark}" for remark in self.remarks)]
