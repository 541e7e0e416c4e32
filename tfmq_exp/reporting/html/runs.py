"""Folders of runs, read for a page: what cannot be read becomes a line of its own, never an error."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tfmq_exp.report.records import ScoreRecord, rows_of

Row = Mapping[str, Any]
MARKS = ("results.json", "status.json", "environment.json", "config.yaml", ".hydra")  # any of them: a run was here
STORED = ("manifest.json", "inputs.json")  # an entry of the store, which has no runs below it
DEPLOYED_TRAJECTORY = "trajectory_error_deployed.csv"  # of the model as an engine executes it
SITES = "sites.csv"
# file -> (columns of text, columns of numbers)
TABLES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "temporal_error.csv": ((), ("t", "relative_mse")),
    "trajectory_error.csv": ((), ("t", "eps_error", "x_error")),
    "units.csv": (("unit",), ("error_before", "error_after", "seconds")),
    "losses.csv": (("phase", "unit"), ("iteration", "loss")),
    DEPLOYED_TRAJECTORY: ((), ("t", "eps_error", "x_error")),
    SITES: (("site", "role", "executed", "weight_bits", "why"), ()),
}
# found: an earlier job had done the same; planned: it was asked only what it would do; died: it neither ended nor runs;
# unfinished: it does not say
STATES = ("done", "found", "planned", "failed", "interrupted", "died", "running", "unfinished")
GOOD = ("done", "found", "planned")


@dataclass(frozen=True)
class Run:
    """One job, or a file of saved records.

    Args:
        name: its path below the folder that was asked for.
        state: one of `STATES`.
        reason: why it failed, or which folder it was found in; empty otherwise.
        records: those of `results.json`, the float network's first.
        tables: rows of the files in `TABLES`, by file name; only those that are there and whole.
        chosen: the files of the configuration's groups, such as runtime: smoke; empty where Hydra left no record of them.
        problems: files that are missing or damaged, in words.
        saved: whether this is a file of saved records, which has no folder.
    """

    name: str
    folder: Path
    state: str
    reason: str = ""
    records: tuple[ScoreRecord, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Row] = field(default_factory=dict)
    tables: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    saved: bool = False

    def choice(self, group: str, otherwise: str = "?") -> str:
        """The name of its model, quant or method, as configured."""
        chosen = self.config.get(group)
        return str(chosen.get("name", otherwise)) if isinstance(chosen, Mapping) else otherwise

    @property
    def engine(self) -> str:
        """What was asked to execute the model; empty where nothing was."""
        chosen = self.config.get("engine")
        target = str(chosen.get("_target_", "")) if isinstance(chosen, Mapping) else ""
        return self.chosen.get("engine", target.rpartition(".")[2]) if target else ""


def run_folders(root: Path) -> list[Path]:
    """Folders of runs at or below a folder, in the order of their numbers; nothing below a run is another run."""
    found: list[Path] = []
    for place, folders, files in os.walk(root):
        present = {*folders, *files}
        if present & set(MARKS):
            found.append(Path(place))
            folders.clear()
        elif present & set(STORED):
            folders.clear()
        folders.sort()
    return sorted(found, key=lambda path: [_natural(part) for part in path.parts])


def _natural(text: str) -> tuple[int, str]:
    """Sort key: 10-name comes after 9-name."""
    digits = text.partition("-")[0]
    return (int(digits) if digits.isdecimal() else -1, text)


def collect(sources: Sequence[Path]) -> list[Run]:
    """Every run below the folders, and every file of saved records (`.jsonl`).

    Raises:
        ValueError: a source that is not there, or none of them has a run.
    """
    if absent := [str(source) for source in sources if not source.exists()]:
        raise ValueError(f"{', '.join(absent)} is not there; give folders of runs or saved records (.jsonl)")
    runs: dict[Path, Run] = {}
    for source in sources:
        if source.is_file():
            runs[source.resolve()] = read_saved(source)
            continue
        for folder in run_folders(source):
            name = str(folder.relative_to(source)) if folder != source else folder.resolve().name
            runs.setdefault(folder.resolve(), read_run(folder, name))
    if not runs:
        raise ValueError(f"no folder of a run at or below {', '.join(map(str, sources))}")
    return list(runs.values())


def read_saved(path: Path) -> Run:
    """A file of saved records as one run that has many."""
    problems: list[str] = []
    found = _tried(path, lambda p: _records(rows_of(p)), problems) or ()
    records = tuple(_finite(record, problems) for record in found)
    return Run(path.name, path, "done" if records else "failed", records=records, problems=tuple(problems), saved=True)


def read_run(folder: Path, name: str) -> Run:
    """A run from its folder."""
    problems: list[str] = []

    def read(file: str, how: Callable[[Path], Any], otherwise: Any) -> Any:
        path = folder / file
        found = _tried(path, how, problems) if path.is_file() else None
        return otherwise if found is None else found

    records = tuple(_finite(record, problems) for record in read("results.json", lambda p: _records(rows_of(p)), ()))
    config = read("config.yaml", _yaml_mapping, {}) or read(".hydra/config.yaml", _yaml_mapping, {})
    stages = read("artifacts.json", _mapping_of_mappings, {})
    tables = {file: read(file, lambda p: _rows(p, *TABLES[p.name]), ()) for file in TABLES}
    state, reason = _state(folder, read("status.json", _json_mapping, {}), config, stages)
    if state in ("done", "found"):
        wanted = ["config.yaml", "environment.json", "artifacts.json"]
        if config.get("goal", "scores") == "scores":
            wanted += ["results.json", "temporal_error.csv", "trajectory_error.csv"]
        if absent := [file for file in wanted if not (folder / file).is_file()]:
            problems.append(f"no {', '.join(absent)}")
    return Run(
        name,
        folder,
        state,
        reason,
        records,
        config,
        read("environment.json", _json_mapping, {}),
        stages,
        {file: rows for file, rows in tables.items() if rows},
        read(".hydra/hydra.yaml", _chosen, {}),
        tuple(problems),
    )


def _state(
    folder: Path, status: Mapping[str, Any], config: Mapping[str, Any], stages: Mapping[str, Row]
) -> tuple[str, str]:
    """What the run says of itself, or else what its files say: stages are written when the goal is reached."""
    said = str(status.get("state", ""))
    if said == "running" and _left(folder / ".running.lock"):
        where = f"process {status.get('pid', '?')} on {status.get('host', '?')}"
        return "died", f"{where} is gone: killed, or out of memory"
    if said in STATES:
        return said, str(status.get("reason") or "")
    ended = bool(stages) and config.get("goal", "scores") != "scores"
    return "done" if ended or (folder / "results.json").is_file() else "unfinished", ""


def _left(lock: Path) -> bool:
    """Whether nobody holds a lock that somebody took. One that cannot be opened for writing may be held."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except (Timeout, OSError):
        return False


def _tried(path: Path, how: Callable[[Path], Any], problems: list[str]) -> Any:
    """What was read, or None and a line for the reader."""
    try:
        return how(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        problems.append(f"{path.name} cannot be read: {text[:200] or type(error).__name__}")
        return None


def _records(rows: Any) -> tuple[ScoreRecord, ...]:
    """Records, checked for what tables and charts take from them.

    Raises:
        ValueError: a record without a mapping or a number where one must be.
    """
    records = tuple(ScoreRecord(**row) for row in rows)
    for record in records:
        parts = (record.scores, record.errors, record.cost, record.quantized, record.protocol, record.choices)
        if not all(isinstance(part, dict) for part in (*parts, record.evaluator, record.environment)):
            raise ValueError(f"the record of {record.method} has text or a number where a mapping must be")
        if wrong := [name for name, value in {**record.scores, **record.errors}.items() if not _number(value)]:
            raise ValueError(f"{', '.join(wrong)} of {record.method}: not a number")
        if "name" not in record.evaluator:
            raise ValueError(f"the record of {record.method} names no evaluator")
    if not records:
        raise ValueError("no records")
    return records


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(record: ScoreRecord, problems: list[str]) -> ScoreRecord:
    """The record without numbers that no mean can take; what diverged is named."""
    for name, value in {**record.scores, **record.errors}.items():
        if not math.isfinite(value):
            problems.append(f"{name} of {record.quant} {record.method}, seed {record.seed}, is {value}")
    scores, errors = (
        {name: value for name, value in part.items() if math.isfinite(value)} for part in (record.scores, record.errors)
    )
    return dataclasses.replace(record, scores=scores, errors=errors)


def _yaml_mapping(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    return found


def _chosen(path: Path) -> dict[str, str]:
    return {str(group): str(file) for group, file in _yaml_mapping(path)["hydra"]["runtime"]["choices"].items()}


def _json_mapping(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    return found


def _mapping_of_mappings(path: Path) -> dict[str, dict[str, Any]]:
    found = _json_mapping(path)
    if not all(isinstance(value, dict) for value in found.values()):
        raise ValueError("not a mapping of mappings")
    return found


def _rows(path: Path, texts: tuple[str, ...], numbers: tuple[str, ...]) -> tuple[Row, ...]:
    """Rows of a CSV file with these columns; the others are left as text.

    Raises:
        ValueError: a column that is missing, or a line that ends early.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in (*texts, *numbers) if name not in (reader.fieldnames or ())]:
            raise ValueError(f"no column {', '.join(missing)}")
        rows = list(reader)
    if any(row[name] is None for row in rows for name in texts):
        raise ValueError("a line that ends early")
    return tuple({**row, **{name: float(row[name]) for name in numbers}} for row in rows)
