"""Score records: what every scored network of a run leaves for tables, and the files that hold them."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, get_origin, get_type_hints

from tfmq_exp.core.files import read_record, write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class ScoreRecord:
    """One row of a table. Rows of other protocols or evaluators are not comparable; of other settings, no repetitions."""

    model: str
    quant: str
    method: str  # "float" for the unquantized network
    seed: int
    scores: dict[str, float]  # fid, sfid, is
    protocol: dict[str, Any]  # network (hash of its weights, settings, noise schedule), sampler, images, precision
    evaluator: dict[str, Any]  # name and provenance of feature extractor and reference
    weights_bytes: int
    choices: dict[str, str] = field(default_factory=dict)  # of config groups, that make the row what it is
    errors: dict[str, float] = field(default_factory=dict)  # means against the float network, whose row has none
    quantized: dict[str, Any] = field(default_factory=dict)  # shares of weights and MACs that are integer
    cost: dict[str, Any] = field(default_factory=dict)  # seconds by stage, peak memory, calibration samples, iterations
    keys: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    # `hash` of all that the method is made of but the seed; `named`: what was changed in it outside the choices
    settings: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


KINDS = {name: get_origin(kind) or kind for name, kind in get_type_hints(ScoreRecord).items()}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse(row: Any) -> ScoreRecord:
    record = ScoreRecord(**row)
    for name, kind in KINDS.items():
        value = getattr(record, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be of {kind.__name__}, got {str(value)[:50]!r}")
    if wrong := [name for name, value in (record.scores | record.errors).items() if not is_number(value)]:
        raise ValueError(f"{', '.join(wrong)} of {record.method}: not a number")
    if "name" not in record.evaluator:
        raise ValueError(f"the record of {record.method} names no evaluator")
    return record


def read_file(path: Path) -> tuple[ScoreRecord, ...]:
    """The records of a `results.json` or of a file of `save_records`.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: no such file.
    """
    if path.suffix == ".json":
        return tuple(map(_parse, read_record(path)["rows"]))
    return tuple(_parse(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())


def read_records(*sources: Path) -> list[ScoreRecord]:
    """Read all records of files, and of the `results.json` files below folders.

    Records of the same images with the same scores under the same choices count once.

    Raises:
        ValueError: a file that is not such a record.
    """
    found: dict[str, ScoreRecord] = {}
    for path in chain(*([s] if s.is_file() else sorted(s.rglob("results.json")) for s in sources)):
        try:
            found |= {_identity(record): record for record in read_file(path)}
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
    """Write one record per line, without paths into one machine's store and without the command line."""

    def portable(record: ScoreRecord) -> str:
        cost = {key: value for key, value in record.cost.items() if key != "stages"}
        environment = {key: value for key, value in record.environment.items() if key != "command"}
        return json.dumps(record.to_json() | {"cost": cost, "environment": environment}, sort_keys=True) + "\n"

    write_atomically(path, lambda partial: partial.write_text("".join(map(portable, records)), encoding="utf-8"))
