"""Captions from files: one per line, or COCO's annotations."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.core.text_files import decode_text, read_lines

INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # of Unicode's categories
# Files that hold more than captions, by the end of their names.
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".ods")
# The beginning of a row with an image's file before its caption, as in Flickr8k's captions.txt.
ROW = re.compile(r"""["']?[^\s,;|]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)["']?(?:#\d+)?\s*[,;|\t]""", re.IGNORECASE)
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of pairs, which JSON can write


@dataclass(frozen=True)
class CocoFile:
    """Content of one of COCO's caption files.

    Args:
        captions: by image id, in its order: of several, the one with the smallest id that is not blank.
        names: of image files, by image id, where the file has them.
    """

    captions: Mapping[int, str]
    names: Mapping[int, str]


def read_coco(path: Path) -> CocoFile:
    """Read a file like captions_val2014.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, an image with blank captions only, or two with the same id.
    """
    text = decode_text(path)
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise TypeError(f"expected names with values, got a {kind}; captions alone go into a text file")
        rows = sorted(
            (typed(a, "image_id", int), typed(a, "id", int), typed(a, "caption", str).strip())
            for a in typed(content, "annotations", list)
        )
        names = {typed(i, "id", int): typed(i, "file_name", str) for i in content.get("images", [])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a COCO caption file: {type(error).__name__} {error}") from error
    if twice := [number for number, count in Counter(number for _, number, _ in rows).items() if count > 1]:
        raise ValueError(f"{path}: {len(twice)} annotations share their id with another, first {twice[0]}")
    captions: dict[int, str] = {}
    for image, _, caption in rows:
        captions[image] = captions.get(image) or caption
    if blank := [image for image, caption in captions.items() if not caption]:
        raise ValueError(f"{path}: {len(blank)} images have only blank captions, first image {blank[0]}")
    return CocoFile(captions, names)


def caption_of_every_image(path: Path) -> list[str]:
    """Captions of a COCO file in the order of image ids; ValueError for a listed image without any, see `read_coco`."""
    content = read_coco(path)
    names = content.names
    if lacking := sorted(names.keys() - content.captions.keys()):
        raise ValueError(f"{path}: {len(lacking)} of {len(names)} images have no caption, first image {lacking[0]}")
    return list(content.captions.values())


def typed(record: Any, key: str, kind: type) -> Any:
    """A value of a record; TypeError unless it is of this very type (a bool is no int)."""
    value = record[key]
    if type(value) is not kind:
        raise TypeError(f"{key} must be of type {kind.__name__}, got {value!r:.60}")
    return value


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of a text file, one per line, or of a COCO annotation file (`.json`), one per image, in the order of image ids.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no captions, another encoding or format, or a blank line: left out, it would shift the captions after it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no captions at {path}: give a text file with one a line, or COCO's captions_*.json")
    suffix = path.suffix.lower()
    found = () if suffix in TABLES else tuple(caption_of_every_image(path) if suffix == ".json" else read_lines(path))
    if suffix in TABLES or (suffix != ".json" and is_table(found)):
        raise ValueError(
            f"{path} is a table: give a text file with one caption a line (.txt), or COCO's captions_*.json"
        )
    if all(map(is_blank, found)):
        raise ValueError(f"{path} holds no captions")
    if wrong := [number for number, caption in enumerate(found, 1) if NO_TEXT.search(caption)]:
        raise ValueError(f"{path}: caption {wrong[0]} has a character that is in no text: {found[wrong[0] - 1]!r:.60}")
    if blank := [number for number, caption in enumerate(found, 1) if is_blank(caption)]:
        several = f"{len(blank)} lines are blank, first line {blank[0]}"
        lines = f"line {blank[0]} is blank" if len(blank) == 1 else several
        raise ValueError(f"{path}: {lines}: line i is the caption of image i; give it one, or delete the line")
    return found


def is_table(lines: Sequence[str]) -> bool:
    """Whether lines are JSON, in all or each, or rows that begin with the name of an image; the first may be a heading."""
    rows = lines[1:] or lines
    return is_json("\n".join(lines)) or (bool(rows) and all(ROW.match(row) or is_json(row) for row in rows))


def is_json(text: str) -> bool:
    """Whether a text is a list or an object of JSON."""
    if not text.startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def is_blank(caption: str) -> bool:
    """Whether it has no visible character: spaces, controls (as DOS ends files with) and invisible marks alone."""
    return all(unicodedata.category(sign) in INVISIBLE for sign in caption)
