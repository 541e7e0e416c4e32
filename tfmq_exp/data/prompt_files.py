"""Files of prompts as benchmarks publish them: JSON and YAML by name, JSON lines, and tables with a column of prompts."""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from tfmq_exp.core.text_files import decode_text, read_lines

Choice = Literal["first", "shuffled"]
COLUMNS = ("prompt", "prompts")  # of a table, in either case
EXPECTED = (
    "expected MJHQ-30K's meta_data.json, names with prompts (.yaml), lines of JSON with `prompt` (.jsonl), or a table with a "
    "column `Prompt` or `Prompts` (.tsv, .csv)"
)


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by name, in the order of the file; rows and lines are named by their number, from 0.

    Spaces around a prompt are no part of it. In a .tsv quotes are characters, as in PartiPrompts, one of which begins with
    one; in a .csv they enclose cells.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or a prompt that is missing, empty or no text, with its line or name.
    """
    readers = {".json": _by_name, ".yaml": _by_name, ".yml": _by_name, ".jsonl": _json_lines}
    reader = readers.get(path.suffix.lower()) or {".tsv": _table, ".csv": _table}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is no file of prompts: {EXPECTED}")
    found: dict[str, str] = {}
    for place, name, prompt in reader(path):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}, {place}: the prompt must be a text, got {prompt!r:.60}")
        found[name] = prompt.strip()
    if not found:
        raise ValueError(f"{path} holds no prompts: {EXPECTED}")
    return found


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The records of MJHQ-30K's meta_data.json by name: `category` and `prompt`; ValueError for another file."""
    content = _mapping(path)
    if wrong := [name for name, record in content.items() if not _is_record(record)]:
        raise ValueError(f"{path}, {wrong[0]}: expected texts `category` and `prompt`, got {content[wrong[0]]!r:.60}")
    return content


def choose_names(names: Sequence[str], count: int | None, choice: Choice) -> list[str]:
    """Names of a subset: the first of the file, or of a shuffled list; None for all, in the order of the file.

    `shuffled` is deepcompressor's rule for MJHQ-30K, COCO's prompts and its calibration (its dataset/data): the list is
    shuffled by Python's generator of seed 0, and those that are taken are sorted by name.
    """
    if count is None:
        return list(names)
    if count > len(names):
        raise ValueError(f"{count} prompts are asked for, and there are {len(names)}")
    if choice == "first":
        return list(names[:count])
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    return sorted(shuffled[:count])


def _is_record(record: Any) -> bool:
    return isinstance(record, Mapping) and all(isinstance(record.get(key), str) for key in ("category", "prompt"))


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file, which must be values by name."""
    text, is_json = decode_text(path), path.suffix.lower() == ".json"
    try:
        content = json.loads(text) if is_json else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.MarkedYAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = error.lineno if isinstance(error, json.JSONDecodeError) else mark.line + 1 if mark else 1
        raise ValueError(f"{path}, line {line}: damaged, {str(error).splitlines()[0]}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: {EXPECTED}")
    return {str(name): value for name, value in content.items()}


def _by_name(path: Path) -> Iterator[tuple[str, str, Any]]:
    for name, value in _mapping(path).items():
        yield name, name, value.get("prompt") if isinstance(value, dict) else value


def _json_lines(path: Path) -> Iterator[tuple[str, str, Any]]:
    for i, line in enumerate(read_lines(path)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {i + 1}: damaged, {str(error).splitlines()[0]}") from error
        yield f"line {i + 1}", str(i), record.get("prompt") if isinstance(record, dict) else record


def _table(path: Path) -> Iterator[tuple[str, str, Any]]:
    tabs = path.suffix.lower() == ".tsv"
    options: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    rows = csv.reader(decode_text(path).splitlines(keepends=True), **options)
    try:
        heading = next(rows, [])
        column = next((i for i, title in enumerate(heading) if title.strip().lower() in COLUMNS), None)
        if column is None:
            raise ValueError(f"{path}, line 1: no column {' or '.join(COLUMNS)} in {heading!r:.80}")
        for i, row in enumerate(rows):
            if len(row) != len(heading):
                raise ValueError(f"{path}, line {rows.line_num}: {len(row)} cells under {len(heading)} titles")
            yield f"line {rows.line_num}", str(i), row[column]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: damaged, {error}") from error
