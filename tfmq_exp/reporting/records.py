"""The record that every run leaves: its scores, and how they were made."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from tfmq_exp.core.files import read_record, write_atomically

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
        """Plain data."""
        return dataclasses.asdict(self)


KINDS = get_type_hints(ScoreRecord)


def save_records(records: Sequence[ScoreRecord], path: Path) -> None:
    """One record per line, so that a table can be made again where the run folders are gone.

    Without what speaks of one machine's folders: where stages lie in its store, and the command line.
    """

    def portable(record: ScoreRecord) -> dict[str, Any]:
        cost = {key: value for key, value in record.cost.items() if key != "stages"}
        environment = {key: value for key, value in record.environment.items() if key != "command"}
        return dataclasses.replace(record, cost=cost, environment=environment).to_json()

    text = "".join(json.dumps(portable(record), sort_keys=True) + "\n" for record in records)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def checked(row: Any) -> ScoreRecord:
    """A record of plain data; ValueError or TypeError for a value that is not of its field's kind."""
    record = ScoreRecord(**row)
    for entry in dataclasses.fields(record):
        value, kind = getattr(record, entry.name), get_origin(KINDS[entry.name]) or KINDS[entry.name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{entry.name} must be of {kind.__name__}, got {str(value)[:50]!r}")
    return record


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Records as plain data, from a `results.json` or from a file of `save_records`."""
    if path.suffix == ".json":
        return read_record(path)["rows"]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_records(*sources: Path) -> list[ScoreRecord]:
    """Every record in files, or in the `results.json` files below folders; repeated ones count once.

    Those repeat each other that have the same scores of the same images, under the same choices.

    Raises:
        ValueError: a file that is not such a record.
    """
    found: dict[str, ScoreRecord] = {}
    for path in (
        path for source in sources for path in ([source] if source.is_file() else sorted(source.rglob("results.json")))
    ):
        try:
            for row in rows_of(path):
                record = checked(row)
                key = record.keys.get("scores", record.keys)  # one for the images and their judge; float rows have none
                way = [record.model, record.quant, record.method, record.choices]
                judged = [record.protocol, record.evaluator, record.settings, [] if key else record.scores]
                identity = [*way, record.seed, key, *judged]
                found[json.dumps(identity, sort_keys=True)] = record
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} is not a results file of this program: {reason}") from error
    return list(found.values())
