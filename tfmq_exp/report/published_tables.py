"""Published tables as their papers print them, read from the data files in `published/`; every row says how it was verified."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "published"
SCORES = "fid fid_spread sfid is clip precision gpu_hours memory_mb speedup size_mb latency_s"
# how a number was seen: mark and meaning; capitals were seen where they are printed first
VERIFIED = {
    "poster": ("P", "the authors' poster"),
    "page": ("A", "the authors' page or abstract"),
    "supplement": ("S", "the paper's supplement"),
    "code": ("C", "the authors' code"),
    "full_text": ("T", "text of the paper that prints the row"),
    "image": ("I", "image of the table, from its authors"),
    "secondary": ("q", "quoted by others"),
    "secondary_notes": ("n", "reading notes, which a machine may have written"),
    "derived": ("d", "arithmetic on such numbers"),
    "memory": ("m", "from memory, unverified: no target"),
}
KINDS = {str: "text", dict: "a mapping", list: "a list"}
FILE = {"paper": str, "reference": str, "tables": dict}
TABLE = {"title": str, "rows": list, "protocol": dict, "paper": str, "reference": str}
DEFAULTS: dict[str, Any] = {"note": "", "scores": {}, "deltas": {}, "protocol": {}, "choices": {}}  # of a row
ROW = dict.fromkeys(("model", "bits", "method", "verified"), str) | {name: type(of) for name, of in DEFAULTS.items()}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table."""

    paper: str  # that prints the row; in a table of another paper than its file's, that paper
    reference: str
    table: str
    title: str
    model: str
    bits: str
    method: str  # "float" for the unquantized network
    scores: dict[str, float | None]  # None: it is printed that there is none; `fid_spread` follows the plus-minus sign
    deltas: dict[str, float | None]  # differences from a baseline, where the paper gives those alone
    verified: str  # of `VERIFIED`
    protocol: dict[str, Any]  # of the table and of this row: sampler, steps, eta, images
    note: str
    choices: dict[str, str] = field(default_factory=dict)  # what to change in the method here, as on the command line


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML without repeated keys, of which plain YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is repeated", key.start_mark)
        return super().construct_mapping(node, deep)


def _checked(value: Any, where: str, kinds: Mapping[str, type], optional: str = "") -> dict[str, Any]:
    """A mapping with these keys of these kinds, of which optional ones may be absent."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: {value!r} is not a mapping with text for keys")
    unknown, missing = value.keys() - kinds, kinds.keys() - value.keys() - {*optional.split()}
    if wrong := unknown or missing:
        raise ValueError(f"{where}: {'unknown' if unknown else 'no'} {', '.join(sorted(wrong))}")
    for name, each in value.items():
        if not isinstance(each, kinds[name]):
            raise ValueError(f"{where}: {name} {each!r} is not {KINDS[kinds[name]]}")
    return value


def _row(given: Any, where: str, table: dict[str, str], protocol: dict[str, Any]) -> PublishedRow:
    row = DEFAULTS | _checked(given, where, ROW, " ".join(DEFAULTS))
    if row["verified"] not in VERIFIED:
        raise ValueError(f"{where}: verified is {row['verified']!r}, not one of {', '.join(sorted(VERIFIED))}")
    if bool(row["scores"]) == bool(row["deltas"]):
        raise ValueError(f"{where}: a row has either scores or deltas")
    for part in ("scores", "deltas"):
        known: dict[str, type] = {name: object for name in SCORES.split()}
        for name, number in _checked(row[part], f"{where}, {part}", known, SCORES).items():
            finite = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            if not finite and number is not None:
                raise ValueError(f"{where}, {part}: {name} is {number!r}, not a number")
        row[part] = {name: None if number is None else float(number) for name, number in row[part].items()}
    row["choices"] = {**_checked(row["choices"], f"{where}, choices", dict.fromkeys(row["choices"], str))}
    row["protocol"] = protocol | row["protocol"]
    _checked(row["protocol"], f"{where}, protocol", dict.fromkeys(row["protocol"], object))
    return PublishedRow(**table, **row)


def _read(path: Path) -> Iterator[tuple[str, PublishedRow]]:
    """The rows of a file, each with its place in it."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    file = _checked(content, str(path), FILE)
    for name, given in _checked(file["tables"], f"{path}, tables", dict.fromkeys(file["tables"], object)).items():
        table = _checked(given, f"{path}, table {name}", TABLE, "protocol paper reference")
        source = {"reference": ""} | table if "paper" in table else file | table
        texts = {key: source[key] for key in ("paper", "reference", "title")} | {"table": name}
        for number, row in enumerate(table["rows"], 1):
            place = f"{path}, table {name}, row {number}"
            yield place, _row(row, place, texts, table.get("protocol", {}))


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
    return "".join(filter(str.isalnum, text.lower()))


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
