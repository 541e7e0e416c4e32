"""Run folders, read for the page: an unreadable file becomes a line of the page, never an error."""

import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tfmq_exp.report.records import ScoreRecord, read_file

Row = Mapping[str, Any]
Rows = Sequence[Row]
RUN_FILES = {"results.json", "status.json", "environment.json", "config.yaml", ".hydra"}  # any of them: a run was here
STORE_FILES = {"manifest.json", "inputs.json"}  # an entry of the store, which has no runs below it
TEMPORAL, TRAJECTORY = "temporal_error.csv", "trajectory_error.csv"
DEPLOYED_TRAJECTORY = "trajectory_error_deployed.csv"  # of the model as an engine executes it
UNITS, LOSSES, SITES = "units.csv", "losses.csv", "sites.csv"
# file -> (columns of text, columns of numbers)
TABLES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    TEMPORAL: ((), ("t", "relative_mse")),
    TRAJECTORY: ((), ("t", "eps_error", "x_error")),
    UNITS: (("unit",), ("error_before", "error_after", "seconds")),
    LOSSES: (("phase", "unit"), ("iteration", "loss")),
    DEPLOYED_TRAJECTORY: ((), ("t", "eps_error", "x_error")),
    SITES: (("site", "role", "executed", "weight_bits", "why"), ()),
}
# found: an earlier job had done the same; planned: a dry run; died: it neither ended nor runs; unfinished: it does not say
STATES = ("done", "found", "planned", "failed", "interrupted", "died", "running", "unfinished")
GOOD_STATES = ("done", "found", "planned")


@dataclass(frozen=True)
class Run:
    """One job, or a file of saved records."""

    name: str  # its path below the given folder
    folder: Path
    state: str  # one of `STATES`
    reason: str = ""  # why it failed, or which folder it was found in; empty otherwise
    records: tuple[ScoreRecord, ...] = ()  # those of `results.json`, the float network's first
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Row] = field(default_factory=dict)
    tables: Mapping[str, Rows] = field(default_factory=dict)  # rows of the files in `TABLES`; only complete ones
    choices: Mapping[str, str] = field(default_factory=dict)  # of config groups, such as runtime: smoke
    problems: tuple[str, ...] = ()  # files that are missing or damaged, in words
    saved: bool = False  # a file of saved records, which has no folder

    def configured(self, group: str, otherwise: str = "?") -> str:
        """The name of its model, quant or method in the configuration."""
        node = self.config.get(group)
        return str(node.get("name", otherwise)) if isinstance(node, Mapping) else otherwise

    @property
    def engine(self) -> str:
        """The configured engine; empty for simulated quantization alone."""
        node = self.config.get("engine")
        target = str(node.get("_target_", "")) if isinstance(node, Mapping) else ""
        return self.choices.get("engine", target.rpartition(".")[2].lower()) if target else ""

    @property
    def is_smoke(self) -> bool:
        """Whether it was made with `debug=smoke`, to see that it runs."""
        command = str(self.environment.get("command", "")).split()
        return self.choices.get("runtime") == "smoke" or "debug=smoke" in command


def _run_folders(root: Path) -> list[Path]:
    """Folders of runs at or below a folder, in the order of their numbers; nothing below a run is another run."""
    found: list[Path] = []
    for place, folders, files in os.walk(root):
        present = {*folders, *files}
        if present & RUN_FILES:
            found.append(Path(place))
        if present & (RUN_FILES | STORE_FILES):
            folders.clear()
    numbers = [[(int(n) if (n := part.partition("-")[0]).isdecimal() else -1, part) for part in p.parts] for p in found]
    return [path for _, path in sorted(zip(numbers, found, strict=True))]  # 10-name comes after 9-name


def read_runs(sources: Sequence[Path]) -> list[Run]:
    """Read every run below the folders, and every file of saved records (`.jsonl`).

    Raises:
        ValueError: a source that does not exist, or no run in any of them.
    """
    if absent := [str(source) for source in sources if not source.exists()]:
        raise ValueError(f"{', '.join(absent)} is not there; give folders of runs or saved records (.jsonl)")
    runs: dict[Path, Run] = {}
    for source in sources:
        if source.is_file():
            problems: list[str] = []
            records = _read(source, partial(_records, problems), (), problems)
            state = "done" if records else "failed"
            run = Run(source.name, source, state, records=records, problems=tuple(problems), saved=True)
            runs[source.resolve()] = run
            continue
        for folder in _run_folders(source):
            name = str(folder.relative_to(source)) if folder != source else folder.resolve().name
            runs.setdefault(folder.resolve(), _read_run(folder, name))
    if not runs:
        raise ValueError(f"no folder of a run at or below {', '.join(map(str, sources))}")
    return list(runs.values())


def _read_run(folder: Path, name: str) -> Run:
    problems: list[str] = []

    def read(file: str, parse: Callable[[Path], Any] = _mapping, default: Any = None) -> Any:
        return _read(folder / file, parse, {} if default is None else default, problems)

    records = read("results.json", partial(_records, problems), ())
    config = read("config.yaml") or read(".hydra/config.yaml")
    stages = read("artifacts.json", partial(_mapping, kind=dict))
    tables = {file: rows for file in TABLES if (rows := read(file, _rows, ()))}
    state, reason = _state(folder, read("status.json"), config, stages)
    if state in ("done", "found"):
        expected = ["config.yaml", "environment.json", "artifacts.json"]
        if config.get("until", "scores") == "scores":
            expected += ["results.json", TEMPORAL, TRAJECTORY]
        if absent := [file for file in expected if not (folder / file).is_file()]:
            problems.append(f"no {', '.join(absent)}")
    environment, choices = (
        read("environment.json"),
        read(".hydra/hydra.yaml", _choices),
    )
    return Run(name, folder, state, reason, records, config, environment, stages, tables, choices, tuple(problems))


def _state(folder: Path, status: Row, config: Row, stages: Mapping[str, Row]) -> tuple[str, str]:
    """State and reason from the status file, or else from the other files: stages are written when the goal is reached."""
    state, lock = str(status.get("state", "")), folder / ".running.lock"
    if state == "running" and lock.is_file():
        # no process holds the lock; one that cannot be opened for writing may be held
        with suppress(Timeout, OSError), FileLock(lock).acquire(timeout=0):
            process = f"process {status.get('pid', '?')} on {status.get('host', '?')}"
            return "died", f"{process} is gone: killed, or out of memory"
    if state in STATES:
        return state, str(status.get("reason") or "")
    ended = bool(stages) and config.get("until", "scores") != "scores"
    return "done" if ended or (folder / "results.json").is_file() else "unfinished", ""


def _read(path: Path, parse: Callable[[Path], Any], default: Any, problems: list[str]) -> Any:
    """Parse a file; the default where there is none, and a problem where it cannot be read."""
    try:
        return parse(path) if path.is_file() else default
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        problems.append(f"{path.name} cannot be read: {text[:200] or type(error).__name__}")
        return default


def _records(problems: list[str], path: Path) -> tuple[ScoreRecord, ...]:
    """The records without numbers that no mean can take; what diverged is named."""
    found: list[ScoreRecord] = []
    for record in read_file(path):
        odd = {name: value for name, value in (record.scores | record.errors).items() if not math.isfinite(value)}
        problems += [f"{name} of {record.quant} {record.method}, seed {record.seed}, is {odd[name]}" for name in odd]
        scores, errors = ({k: v for k, v in of.items() if k not in odd} for of in (record.scores, record.errors))
        found.append(replace(record, scores=scores, errors=errors))
    if not found:
        raise ValueError("no records")
    return tuple(found)


def _mapping(path: Path, kind: type = object) -> dict[str, Any]:
    """A mapping of a JSON or YAML file, with values of one kind."""
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
        raise ValueError("not a mapping" if kind is object else f"not a mapping to values of {kind.__name__}")
    return found


def _choices(path: Path) -> dict[str, str]:
    return {str(group): str(file) for group, file in _mapping(path)["hydra"]["runtime"]["choices"].items()}


def _rows(path: Path) -> tuple[Row, ...]:
    """Rows of a CSV file with the columns of `TABLES`; others stay text."""
    texts, numbers = TABLES[path.name]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in (*texts, *numbers) if name not in (reader.fieldnames or ())]:
            raise ValueError(f"no column {', '.join(missing)}")
        rows = list(reader)
    if any(row[name] is None for row in rows for name in texts):
        raise ValueError("a line that ends early")
    return tuple({**row, **{name: float(row[name]) for name in numbers}} for row in rows)
