"""Captions from files: one a line, or COCO's annotations."""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.core.text_files import decode_text, read_lines

INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # of Unicode's categories
TABLES = (".jsonl", ".csv", ".tsv")  # whose lines hold more than a caption


@dataclass(frozen=True)
class CocoFile:
    """What one of COCO's caption files says.

    Args:
        captions: of each image by its id, in the order of ids: of several, the one with the smallest id that is not blank.
        names: of the images' files by the images' ids, where the file has them.
    """

    captions: Mapping[int, str]
    names: Mapping[int, str]


def read_coco(path: Path) -> CocoFile:
    """A file like captions_val2014.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, an image with blank captions only, or two with the same id.
    """
    text = decode_text(path)
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise TypeError(
                f"expected names with values, got a {type(content).__name__}; captions alone go into a text file"
            )
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
    """Those of one of COCO's files in the order of image ids; ValueError for a listed image without any, see `read_coco`."""
    content = read_coco(path)
    if lacking := sorted(content.names.keys() - content.captions.keys()):
        raise ValueError(
            f"{path}: {len(lacking)} of {len(content.names)} images have no caption, first image {lacking[0]}"
        )
    return list(content.captions.values())


def typed(record: Any, key: str, kind: type) -> Any:
    """A value of a record, which must be of a type; truth values are no numbers here."""
    value = record[key]
    if type(value) is not kind:
        raise TypeError(f"{key} must be of type {kind.__name__}, got {value!r:.60}")
    return value


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of a text file, one a line, or of a COCO annotation file (`.json`), one an image, in the order of image ids.

    Caption i is that of line i. So no line may be blank: left out, it would shift all captions after it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none in it, a blank line, another encoding, or another format.
    """
    if not path.exists():
        raise FileNotFoundError(f"no captions at {path}: give a text file with one a line, or COCO's captions_*.json")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise ValueError(
            f"{path} is a table: give a text file with one caption a line (.txt), or COCO's captions_*.json"
        )
    found = tuple(caption_of_every_image(path) if suffix == ".json" else read_lines(path))
    if all(map(is_blank, found)):
        raise ValueError(f"{path} holds no captions")
    if blank := [number for number, caption in enumerate(found, 1) if is_blank(caption)]:
        lines = (
            f"line {blank[0]} is blank" if len(blank) == 1 else f"{len(blank)} lines are blank, first line {blank[0]}"
        )
        raise ValueError(f"{path}: {lines}: line i is the caption of image i; give it one, or delete the line")
    return found


def is_blank(caption: str) -> bool:
    """Whether nothing of it is to be seen: spaces, controls (such as the end of files of DOS) and invisible marks alone."""
    return all(unicodedata.category(sign) in INVISIBLE for sign in caption)
