"""Published numbers, from data files: tables as their papers print them, every row with how it was verified."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SCORES = frozenset(
    {"fid", "fid_spread", "sfid", "is", "clip", "precision"}
    | {"gpu_hours", "memory_mb", "speedup", "size_mb", "latency_s"}
)
VERIFIED = frozenset(
    {"poster", "page", "supplement", "code", "full_text", "image"}
    | {"secondary", "secondary_notes", "derived", "memory"}
)
FILE_KEYS = (frozenset({"paper", "reference", "tables"}), frozenset[str]())
TABLE_KEYS = (frozenset({"title", "rows"}), frozenset({"protocol", "paper", "reference"}))
ROW_KEYS = (
    frozenset({"model", "bits", "method", "verified"}),
    frozenset({"scores", "deltas", "protocol", "note", "choices"}),
)


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table. `method` is "float" for the unquantized network.

    Args:
        paper: who prints the row; in a table of another paper than its file's, that paper.
        scores: as printed, None where it is printed that there is none; `fid_spread` is what stands after the plus-minus sign.
        deltas: differences from a baseline, where the paper gives those alone.
        verified: how the number was seen. "poster", "page" (an official page or abstract), "supplement" and "code" are
            the authors' own; "full_text" and "image" are read in the paper that prints the row; "secondary" quotes it,
            "secondary_notes" are reading notes that a machine may have written; "derived" is arithmetic on such
            numbers; "memory" is unverified, and no target.
        protocol: what the table's rows share, and what is this row's own: sampler, steps, eta, images.
        choices: what has to be changed inside the method here to make the row, as on the command line.
    """

    paper: str
    reference: str
    table: str
    title: str
    model: str
    bits: str
    method: str
    scores: dict[str, float | None]
    deltas: dict[str, float | None]
    verified: str
    protocol: dict[str, Any]
    note: str
    choices: dict[str, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Safe YAML without repeated keys, of which plain YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping.

        Raises:
            ConstructorError: a key that stands twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _mapping(value: Any, where: str, keys: tuple[frozenset[str], frozenset[str]] | None = None) -> dict[str, Any]:
    """A mapping with all of the first keys, and none but those of either set."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: {value!r} is not a mapping with text for keys")
    required, optional = keys or (frozenset[str](), frozenset(value))
    if unknown := value.keys() - required - optional:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
    if missing := required - value.keys():
        raise ValueError(f"{where}: no {', '.join(sorted(missing))}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {value!r} is not text")
    return value


def _numbers(value: Any, where: str) -> dict[str, float | None]:
    """Scores by their names; null stands for one that is not there."""
    found: dict[str, float | None] = {}
    for name, number in _mapping(value, where, (frozenset(), SCORES)).items():
        if number is None:
            found[name] = None
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{where}: {name} is {number!r}, not a number")
        found[name] = float(number)
    return found


def _row(given: Any, where: str, table: dict[str, str], protocol: dict[str, Any]) -> PublishedRow:
    row = _mapping(given, where, ROW_KEYS)
    text = {key: _text(row.get(key, ""), f"{where}, {key}") for key in ("model", "bits", "method", "verified", "note")}
    if text["verified"] not in VERIFIED:
        raise ValueError(f"{where}: verified is {text['verified']!r}, not one of {', '.join(sorted(VERIFIED))}")
    scores = _numbers(row.get("scores", {}), f"{where}, scores")
    deltas = _numbers(row.get("deltas", {}), f"{where}, deltas")
    if bool(scores) == bool(deltas):
        raise ValueError(f"{where}: a row has either scores or deltas")
    own = _mapping(row.get("protocol", {}), f"{where}, protocol")
    choices = _mapping(row.get("choices", {}), f"{where}, choices")
    choices = {key: _text(value, f"{where}, choices, {key}") for key, value in choices.items()}
    return PublishedRow(**table, **text, scores=scores, deltas=deltas, protocol=protocol | own, choices=choices)


def _read(path: Path) -> Iterator[tuple[str, PublishedRow]]:
    """The rows of a file, each with where it stands."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    file = _mapping(content, str(path), FILE_KEYS)
    for name, given in _mapping(file["tables"], f"{path}, tables").items():
        where = f"{path}, table {name}"
        table = _mapping(given, where, TABLE_KEYS)
        source = table if "paper" in table else file | table
        texts = {
            "paper": _text(source["paper"], where),
            "reference": _text(source.get("reference", ""), where),
            "table": name,
            "title": _text(table["title"], where),
        }
        protocol = _mapping(table.get("protocol", {}), f"{where}, protocol")
        if not isinstance(table["rows"], list):
            raise ValueError(f"{where}: rows is not a list")
        for number, row in enumerate(table["rows"], 1):
            place = f"{where}, row {number}"
            yield place, _row(row, place, texts, protocol)


def read_published(folder: Path) -> list[PublishedRow]:
    """Every row of the YAML files in a folder, in the order of file names and of lines.

    Raises:
        ValueError: no file there, or one with an unknown or missing key, an unknown `verified`, a score that is not a
            number, or a row that stands twice: same paper, table, model, bits, method and note.
    """
    places: dict[tuple[str, ...], str] = {}
    rows: list[PublishedRow] = []
    for path in sorted(folder.glob("*.yaml")):
        for place, row in _read(path):
            identity = (row.paper, row.table, row.model, row.bits, row.method, row.note)
            if identity in places:
                raise ValueError(f"{place}: {' '.join(identity[2:5])} stands at {places[identity]} already")
            places[identity] = place
            rows.append(row)
    if not rows:
        raise ValueError(f"{folder} has no published numbers")
    return rows
