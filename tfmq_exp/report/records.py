"""Score records: what every scored network of a run leaves for tables, and the files that hold them."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, get_origin, get_type_hints

from tfmq_exp.core.files import read_record, write_atomically
from tfmq_exp.core.text_files import decode_text

SCHEMA = 1


@dataclass(frozen=True)
class ScoreRecord:
    """One row of a table. `method` is "float" for the unquantized network.

    Args:
        choices: the config group choices that make the row what it is.
        protocol: network (hash of its weights, settings, noise schedule), sampler, images, uint8 rule, precision: rows with
            different protocols are not comparable.
        evaluator: name and provenance of feature extractor and reference.
        scores: fid, sfid, is.
        errors: mean temporal-feature error and trajectory error against the float network; empty for the float row.
        quantized: shares of weights and MACs that are integer.
        cost: seconds by stage, peak memory, calibration samples, iterations.
        settings: `hash` of all that the method is made of but the seed, and `named`, what a preset and the command line
            changed outside the choices. Rows that differ here are no repetitions of each other.
    """

    model: str
    quant: str
    method: str
    seed: int
    scores: dict[str, float]
    protocol: dict[str, Any]
    evaluator: dict[str, Any]
    weights_bytes: int
    choices: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    quantized: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


KINDS = {name: get_origin(kind) or kind for name, kind in get_type_hints(ScoreRecord).items()}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_record(row: Any) -> ScoreRecord:
    """A record from plain data; ValueError or TypeError for a value that is not of its field's kind."""
    record = ScoreRecord(**row)
    for name, kind in KINDS.items():
        value = getattr(record, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be of {kind.__name__}, got {str(value)[:50]!r}")
    if wrong := [name for name, value in (record.scores | record.errors).items() if not is_number(value)]:
        raise ValueError(f"{', '.join(wrong)} of {record.method}: not a number")
    if record.schema != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {record.schema}: another version's")
    if "name" not in record.evaluator:
        raise ValueError(f"the record of {record.method} names no evaluator")
    return record


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Records as plain data, from a `results.json` or from a file of `save_records`; blank lines are none."""
    if path.suffix == ".json":
        return read_record(path)["rows"]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(decode_text(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error.args[0]}") from error
    return rows


def read_records(*sources: Path) -> list[ScoreRecord]:
    """Read all records of files, and of the `results.json` files below folders.

    Records of the same images with the same scores under the same choices count once.

    Raises:
        ValueError: a file that is not such a record.
    """
    found: dict[str, ScoreRecord] = {}
    for path in chain(*([s] if s.is_file() else sorted(s.rglob("results.json")) for s in sources)):
        try:
            found |= {_identity(record): record for record in map(parse_record, read_rows(path))}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} is not a results file of this program: {reason}") from error
    return list(found.values())


def _identity(record: ScoreRecord) -> str:
    key = record.keys.get("scores", record.keys)  # of the images and their evaluator; float rows have none
    parts = [record.model, record.quant, record.method, record.choices, record.seed, key]
    protocol = [record.protocol, record.evaluator, record.settings, [] if key else record.scores]
    return json.dumps([parts, protocol], sort_keys=True)


def save_records(records: Sequence[ScoreRecord], path: Path) -> None:
    """Write one record per line, so that a table can be made where the run folders are gone.

    Paths into one machine's store and the command line are left out.
    """

    def portable(record: ScoreRecord) -> dict[str, Any]:
        cost = {key: value for key, value in record.cost.items() if key != "stages"}
        environment = {key: value for key, value in record.environment.items() if key != "command"}
        return record.to_json() | {"cost": cost, "environment": environment}

    text = "".join(json.dumps(portable(record), sort_keys=True) + "\n" for record in records)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
