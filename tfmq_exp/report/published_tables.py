"""Published tables as their papers print them, read from the data files in `published/`; every row says how it was verified."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "published"
SCORES = "fid fid_spread sfid is clip precision gpu_hours memory_mb speedup size_mb latency_s"
VERIFIED = {
    *("poster", "page", "supplement", "code", "full_text", "image", "secondary", "secondary_notes", "derived", "memory")
}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table. `method` is "float" for the unquantized network.

    Args:
        paper: that prints the row; in a table of another paper than its file's, that paper.
        scores: as printed, None where it is printed that there is none; `fid_spread` is the number after the plus-minus sign.
        deltas: differences from a baseline, where the paper gives those alone.
        verified: how the number was seen. "poster", "page" (an official page or abstract), "supplement" and "code" are
            the authors' own; "full_text" and "image" are read in the paper that prints the row; "secondary" quotes it,
            "secondary_notes" are reading notes that a machine may have written; "derived" is arithmetic on such
            numbers; "memory" is unverified, and no target.
        protocol: of the table and of this row: sampler, steps, eta, images.
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


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML without repeated keys, of which plain YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is repeated", key.start_mark)
        return super().construct_mapping(node, deep)


def _mapping(value: Any, where: str, required: str = "", optional: str | None = None) -> dict[str, Any]:
    """A mapping with all required keys, and no others but the optional ones; None allows any."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: {value!r} is not a mapping with text for keys")
    if optional is not None and (unknown := value.keys() - {*required.split(), *optional.split()}):
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
    if missing := set(required.split()) - value.keys():
        raise ValueError(f"{where}: no {', '.join(sorted(missing))}")
    return value


def _texts(values: dict[str, Any], where: str) -> dict[str, str]:
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}, {key}: {value!r} is not text")
    return values


def _numbers(value: Any, where: str) -> dict[str, float | None]:
    """Scores by name; null for one of which the paper prints that there is none."""
    scores = _mapping(value, where, optional=SCORES)
    for name, number in scores.items():
        finite = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not finite and number is not None:
            raise ValueError(f"{where}: {name} is {number!r}, not a number")
    return {name: None if number is None else float(number) for name, number in scores.items()}


def _row(row: Any, where: str, table: dict[str, str], protocol: dict[str, Any]) -> PublishedRow:
    row = {"note": ""} | _mapping(row, where, "model bits method verified", "scores deltas protocol note choices")
    text = _texts({name: row[name] for name in ("model", "bits", "method", "verified", "note")}, where)
    if text["verified"] not in VERIFIED:
        raise ValueError(f"{where}: verified is {text['verified']!r}, not one of {', '.join(sorted(VERIFIED))}")
    scores, deltas = (_numbers(row.get(name, {}), f"{where}, {name}") for name in ("scores", "deltas"))
    if bool(scores) == bool(deltas):
        raise ValueError(f"{where}: a row has either scores or deltas")
    own, choices = (_mapping(row.get(name, {}), f"{where}, {name}") for name in ("protocol", "choices"))
    choices = _texts(choices, f"{where}, choices")
    return PublishedRow(**table, **text, scores=scores, deltas=deltas, protocol=protocol | own, choices=choices)


def _read(path: Path) -> Iterator[tuple[str, PublishedRow]]:
    """The rows of a file, each with its place in it."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    file = _mapping(content, str(path), "paper reference tables", "")
    for name, table in _mapping(file["tables"], f"{path}, tables").items():
        where = f"{path}, table {name}"
        table = _mapping(table, where, "title rows", "protocol paper reference")
        source = {"reference": ""} | table if "paper" in table else file | table
        texts = _texts({key: source[key] for key in ("paper", "reference", "title")}, where) | {"table": name}
        protocol = _mapping(table.get("protocol", {}), f"{where}, protocol")
        if not isinstance(table["rows"], list):
            raise ValueError(f"{where}: rows is not a list")
        for number, row in enumerate(table["rows"], 1):
            place = f"{where}, row {number}"
            yield place, _row(row, place, texts, protocol)


def read_published(folder: Path = FOLDER) -> list[PublishedRow]:
    """Read every row of the YAML files in a folder, in the order of file names and of lines.

    Raises:
        ValueError: no file there, or one with an unknown or missing key, an unknown `verified`, a score that is not a
            number, or a repeated row: same paper, table, model, bits, method and note.
    """
    found: dict[tuple[str, ...], tuple[str, PublishedRow]] = {}
    for path in sorted(folder.glob("*.yaml")):
        for place, row in _read(path):
            identity = (row.paper, row.table, row.model, row.bits, row.method, row.note)
            if identity in found:
                raise ValueError(f"{place}: {' '.join(identity[2:5])} is at {found[identity][0]} already")
            found[identity] = place, row
    if not found:
        raise ValueError(f"{folder} has no published numbers")
    return [row for _, row in found.values()]


def tables_by_paper(rows: Sequence[PublishedRow]) -> dict[str, dict[str, str]]:
    """Titles by paper and table."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row.paper, {})[row.table] = row.title
    return found


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def find_paper(rows: Sequence[PublishedRow], name: str) -> str:
    """The full name of a paper. Case, spaces and signs do not count, and the beginning of a name is enough.

    Raises:
        ValueError: no such paper, or more than one; the error names all papers.
    """
    papers = tables_by_paper(rows)
    exact = [paper for paper in papers if _plain(paper) == _plain(name)]
    begun = [paper for paper in papers if _plain(name) and _plain(paper).startswith(_plain(name))]
    if len(found := exact or begun) != 1:
        problem = f"{name!r} could be {' or '.join(found)}" if found else f"no paper {name!r}"
        raise ValueError(f"{problem}; there are {', '.join(sorted(papers))}")
    return found[0]


def find_table(rows: Sequence[PublishedRow], paper: str, table: str) -> list[PublishedRow]:
    """The rows of one table, named as in `find_paper`.

    Raises:
        ValueError: no such paper, more than one, or no such table; the error names the tables of the paper.
    """
    paper = find_paper(rows, paper)
    if not (found := [row for row in rows if row.paper == paper and _plain(row.table) == _plain(table)]):
        raise ValueError(f"{paper} has no table {table!r}; there are {', '.join(tables_by_paper(rows)[paper])}")
    return found
