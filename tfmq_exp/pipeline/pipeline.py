"""Stages, and the pipeline that computes those that the store does not have."""

import json
import logging
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tfmq_exp.core.distributed import ProcessGroup
from tfmq_exp.core.files import intact, write_checked
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.run_config import Run
from tfmq_exp.pipeline.store import Entry, Store

T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)

Advance = Callable[[float, str], None]  # takes the amount that is done, and a note
Progress = Callable[[str, float], AbstractContextManager[Advance]]  # a display that counts to a total, under a name


@dataclass(eq=False)
class Stage(ABC):
    """One step of an experiment. The store keeps its result under a key of its inputs.

    A stage reads the results of others by their own methods, which compute what is not there. `stored_as` is its folder of the
    store; `prefix` tells apart the names of stages that evaluate several networks. `in_parts`: it needs no network that is
    whole in memory.
    """

    run: Run
    pipeline: "Pipeline"
    prefix: str = field(default="", kw_only=True)
    stored_as: ClassVar[str]
    in_parts: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name in the run's records and on the progress bar."""
        return f"{self.prefix}{self.stored_as}"

    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Everything that the result depends on. Computes no stage."""

    @abstractmethod
    def compute(self, folder: Path) -> None:
        """Fill the folder, together with the other processes; what an interrupted attempt has left there is used."""

    def count(self) -> int | None:
        """Images that are left, trajectories, passes of one image, or finished units, for the estimate of the cost."""
        return None

    @cached_property
    def entry(self) -> Entry:
        """Place of the result in the store."""
        return self.pipeline.store.entry(self.stored_as, self.inputs())

    @property
    def key(self) -> str:
        """Hash of the inputs."""
        return self.entry.key

    def result(self) -> Path:
        """Folder of the result, which is computed if it is not there."""
        return self.pipeline.get(self)

    def read_json(self, name: str) -> Any:
        """Content of a JSON file of the result."""
        return json.loads((self.result() / name).read_text(encoding="utf-8"))


class Pipeline:
    """Computes stages through the store and records how that went.

    `stage_log` has the record of each stage by its name, as in `artifacts.json`; `shown_losses` names the loss curves that the
    logger has got while they grew.
    """

    def __init__(self, store: Store, progress: Progress, logger: Logger) -> None:
        self.store, self.progress, self.logger = store, progress, logger
        self.stage_log: dict[str, dict[str, Any]] = {}
        self.shown_losses: set[str] = set()
        self._finished: set[Path] = set()
        self._inner_seconds = 0.0  # spent in the stages that the present one has asked for

    @property
    def group(self) -> ProcessGroup:
        """The processes of this run."""
        return self.store.group

    def get(self, stage: Stage) -> Path:
        """Folder of a stage's result, which is computed if it is not there; else, the first time, `DamagedEntry` may arise."""
        entry = stage.entry
        if entry.path in self._finished:
            return entry.path
        outer, self._inner_seconds = self._inner_seconds, 0.0
        began = time.perf_counter()

        def own_seconds() -> float:
            return round(time.perf_counter() - began - self._inner_seconds, 2)

        computed = self.store.get_or_compute(entry, stage.compute, own_seconds)
        self._record(stage, own_seconds(), computed=computed)
        self._inner_seconds = outer + time.perf_counter() - began
        self._finished.add(entry.path)
        return entry.path

    def compute_files(
        self, files: Mapping[T, Path], make: Callable[[T, Advance], Callable[[Path], object]], advance: Advance
    ) -> None:
        """Write those files that an interrupted attempt has not, shared among the processes; all are there afterwards.

        `make` computes a file and returns what writes it. Its display counts to 1, and so does that of all, `advance`.
        """
        share = self.group.shard([*files])
        for i, item in enumerate(share):
            if not intact(files[item]):
                own: Advance = lambda done, note, i=i: advance((i + done) / len(share), note)  # noqa: E731
                write_checked(files[item], make(item, own))
            advance((i + 1) / len(share), "")
        self.group.barrier()

    def require(self, stage: Stage) -> None:
        """Compute a stage unless all its files are there, which are not read: that takes long where they are large."""
        if not self.group.broadcast(stage.entry.complete):
            self.get(stage)
        elif stage.entry.path not in self._finished:
            self._record(stage, 0.0, computed=False)

    def _record(self, stage: Stage, seconds: float, *, computed: bool) -> None:
        """Note a stage the first time. `seconds` are its own; `took` those when it was made, by this run or another."""
        if stage.name in self.stage_log:
            return
        self.stage_log[stage.name] = {
            "key": stage.key,
            "computed": computed,
            "seconds": seconds,
            "took": stage.entry.seconds,
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "path": str(stage.entry.path),
        }
        self.logger.log_summary(stage_summary(stage.name, self.stage_log[stage.name]))
        log.info("%s %s (%s)", stage.name, "computed" if computed else "found in the store", stage.key)


def stage_summary(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record as numbers of the dashboard."""
    stage = name.replace(" ", "_")
    return {f"stages/{stage}/{key}": record[key] for key in ("computed", "seconds", "took", "peak_mib")}
