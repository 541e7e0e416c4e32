"""What the folders of wandb's offline runs and the files of loggers hold."""

import csv
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def records(path: Path) -> Iterator[Any]:
    """The records of a transaction log: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    data, position, collected = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        collected += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(collected)
            yield record
            collected = b""


@dataclass
class Logged:
    """What one offline folder holds."""

    folder: Path
    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    steps: dict[str, str]  # pattern of metrics -> what they are drawn against
    exit_code: int | None

    def curves(self, prefix: str, axis: str) -> dict[str, list[tuple[int, float]]]:
        """Metric -> points, of all metrics under a prefix."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self.history:
            for key in (key for key in row if key.startswith(prefix)):
                found.setdefault(key.removeprefix(prefix), []).append((row[axis], row[key]))
        return found

    def table(self, name: str) -> dict[str, Any]:
        """A logged table, from its file."""
        path = next(row[f"tables/{name}"]["path"] for row in self.history if f"tables/{name}" in row)
        return json.loads((self.folder / "files" / path).read_text())


def values(items: Any) -> dict[str, Any]:
    """Key -> value; parts of a value that stand apart are put together."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def logged(folder: Path) -> Logged:
    result = Logged(folder, None, {}, [], {}, {}, None)
    for record in records(next(folder.glob("run-*.wandb"))):
        match record.WhichOneof("record_type"):
            case "run":
                result.run, result.config = record.run, values(record.run.config.update)
            case "history":
                result.history.append(values(record.history.item))
            case "summary":
                result.summary |= values(record.summary.update)
            case "metric" if record.metric.step_metric:
                result.steps[record.metric.glob_name] = record.metric.step_metric
            case "exit":
                result.exit_code = record.exit.exit_code
    return result


def offline_folders(run: Path) -> list[Logged]:
    """Every start of a run, the first one first."""
    return [logged(folder) for folder in sorted((run / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_ctime)]


def loss_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of(run / "losses.csv"):
        unit = f"{row['phase']}/{row['unit']}"
        found.setdefault(unit, []).append((int(row["iteration"]), float(row["loss"])))
    return found


def with_slashes(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {unit.replace(".", "/"): points for unit, points in curves.items()}
