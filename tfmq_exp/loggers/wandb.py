"""Weights & Biases."""

import os
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.core.files import write_atomically
from tfmq_exp.loggers.base import Logger, Points, Rows, RunMetadata

MODES = ("offline", "online", "disabled")
OLDER = {"dryrun": "offline", "run": "online", "": "offline"}  # earlier values of WANDB_MODE
IGNORED = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_CONSOLE")  # a run goes on under the id in its folder


@dataclass(frozen=True)
class Wandb(Logger):
    """Settings of Weights & Biases.

    Raises:
        ValueError: another mode.
    """

    project: str  # where runs are shown together
    # offline needs neither account nor network (`wandb sync` uploads later); online needs both; disabled writes nothing, and so
    # does a `WANDB_DISABLED` in the environment
    mode: str = "offline"
    entity: str | None = None  # the user or team that owns the project; None for the account's own
    group: str | None = None  # the name that runs are grouped by; None for the sweep's

    def __post_init__(self) -> None:
        if self.current_mode not in MODES:
            source = ", from WANDB_MODE" if os.environ.get("WANDB_MODE") == self.mode else ""
            raise ValueError(f"logger mode must be {' or '.join(MODES)}, got {self.mode!r}{source}")

    @property
    def current_mode(self) -> str:
        """The mode under its present name."""
        return OLDER.get(self.mode, self.mode)

    def open(self, run: RunMetadata) -> Logger:
        """Start the run, or go on with it where its folder has an id.

        Its folder, name and tags may be given by wandb's own `WANDB_DIR`, `WANDB_NAME` and `WANDB_TAGS`.

        Raises:
            RuntimeError: online without credentials; the terminal is never asked.
        """
        mode, environment = self.current_mode, os.environ
        if switch := switched_off(mode):
            return DisabledLogger(switch)
        environment.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports go out over the network, offline as well
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "logger mode online needs an account: run `wandb login` or set WANDB_API_KEY; offline needs none"
            )
        started = wandb.init(
            project=self.project or None,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            dir=environment.get("WANDB_DIR") or run.folder,
            id=run_id(run.folder),
            resume="allow" if mode == "online" else None,  # offline the same id is enough
            name=environment.get("WANDB_NAME") or run.name,
            group=self.group or run.group,
            job_type=run.kind,
            tags=(*run.tags, *filter(None, environment.get("WANDB_TAGS", "").split(","))),
            config={**run.settings, "choices": dict(run.choices)},
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        return WandbLogger(started, ignored_variables(mode))


def switched_off(mode: str) -> str:
    """The variable or key that switches the logger off; empty if none does."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "WANDB_DISABLED"
    off = "WANDB_MODE" if os.environ.get("WANDB_MODE") == mode else "logger.mode"
    return off if mode == "disabled" else ""


def ignored_variables(mode: str) -> list[str]:
    """Remarks on environment variables that are not followed."""
    given = os.environ.get("WANDB_MODE", mode)
    asked, ignored = OLDER.get(given, given), [name for name in IGNORED if os.environ.get(name)]
    remarks = [f"logger.mode={mode} overrides WANDB_MODE={asked}"] if asked != mode else []
    if ignored:
        remarks.append(f"not followed: {', '.join(ignored)}; a run goes on under the id in its folder")
    return remarks


def run_id(folder: Path) -> str:
    """The run's id in Weights & Biases, kept in its folder from the first time on."""
    path = folder / "wandb.id"
    if not path.is_file():
        write_atomically(path, lambda partial: partial.write_text(uuid.uuid4().hex[:16], encoding="utf-8"))
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class DisabledLogger(Logger):
    """A logger that shows nothing but the reason."""

    switch: str

    def locations(self) -> list[str]:
        return [f"Weights & Biases: nothing written, {self.switch} switches it off"]


class WandbLogger(Logger):
    """A started run.

    It gets `loss/<phase>/<unit>` against `iteration`, other curves against their own axis, `tables/`, `images/`, a summary.
    A resumed run logs all of it again, so that every offline folder is whole.
    """

    def __init__(self, run: Any, remarks: Sequence[str] = ()) -> None:
        self.run, self.folder, self.remarks = run, Path(run.dir).parent, remarks  # its files lie in `files` there
        run.define_metric("iteration", hidden=True, summary="none")
        run.define_metric("loss/*", step_metric="iteration", summary="none")

    def log_loss(self, unit: str, iteration: int, value: float) -> None:
        # dots become slashes, as no pattern of metrics matches dots
        self.run.log({f"loss/{unit.replace('.', '/')}": value, "iteration": iteration})

    def log_curve(self, name: str, axis: str, points: Points) -> None:
        # the axis is a metric, against which the curves of many runs can be laid over each other
        self.run.define_metric(axis, hidden=True, summary="none")
        self.run.define_metric(f"{name}/*", step_metric=axis, summary="none")
        for place, values in points:
            self.run.log({axis: place, **{f"{name}/{key}": value for key, value in values.items()}})

    def log_table(self, name: str, rows: Rows) -> None:
        import wandb

        if rows:
            table = wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
            self.run.log({f"tables/{name}": table})

    def log_image(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({f"images/{name}": wandb.Image(str(path))})

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))

    def locations(self) -> list[str]:
        offline = f", offline: upload it with: wandb sync {shlex.quote(str(self.folder))}"
        place = offline if self.run.offline else f": {self.run.url}"
        return [f"Weights & Biases{place}", *(f"Weights & Biases: {remark}" for remark in self.remarks)]
