"""Conditions of the images of a run, the class or caption of image i; captions come from text files or COCO's annotations."""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.core.text_files import decode_text, read_lines
from tfmq_exp.core.validate import COUNT, check_fields, one_of

Order = Literal["in_turn", "random"]
ORDER = one_of("in_turn", "random")
INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # of Unicode's categories
# Files that hold more than captions, by the end of their names.
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".ods")
# The beginning of a row with an image's file before its caption, as in Flickr8k's captions.txt.
ROW = re.compile(r"""["']?[^\s,;|]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)["']?(?:#\d+)?\s*[,;|\t]""", re.IGNORECASE)
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of pairs, which JSON can write


class Conditioning(Protocol):
    """A choice of conditions."""

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> Sequence[Any]:
        """The labels or captions of images `indices` of a stream; they depend on nothing else."""
        ...


@dataclass(frozen=True)
class Unconditional:
    """No conditions."""

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> Sequence[Any]:
        return ()


@dataclass(frozen=True)
class Classes:
    """Class labels 0 .. count - 1.

    `in_turn` gives every class as often, and spreads any number of images over all classes: neighbouring images are of
    distant classes (files ordered by class ruin the Inception score, and few images should not be all of one kind);
    `random` draws each image's label from its own seed.
    """

    count: int
    order: Order = "in_turn"

    def __post_init__(self) -> None:
        check_fields(self, count=COUNT, order=ORDER)

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> list[int]:
        stride = spreading_stride(self.count)
        return [pick * stride % self.count for pick in _picks(self.order, self.count, seed, stream, indices)]


@dataclass(frozen=True)
class Captions:
    """Captions of a file. `sha256` is that of all captions: results of a changed file are not mistaken for those of the old one."""

    path: str
    sha256: str
    order: Order = "in_turn"

    def __post_init__(self) -> None:
        check_fields(self, order=ORDER)

    @classmethod
    def read(cls, path: str, order: Order = "in_turn") -> "Captions":
        """Conditions from a file, see `read_captions`."""
        return cls(path, hash_of(read_captions(Path(path))), order)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All captions; ValueError if the file has changed since `read`."""
        found = read_captions(Path(self.path))
        if hash_of(found) != self.sha256:
            raise ValueError(f"{self.path} has changed since the run began: start it again")
        return found

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> list[str]:
        return [self.texts[i] for i in _picks(self.order, len(self.texts), seed, stream, indices)]


def _picks(order: Order, count: int, seed: int, stream: str, indices: Iterable[int]) -> list[int]:
    if order == "in_turn":
        return [i % count for i in indices]
    return [derive_seed(seed, stream, Stream.CONDITION, i) % count for i in indices]


@cache
def spreading_stride(count: int) -> int:
    """The stride whose multiples, modulo `count`, visit everything once and leave no large gap at any time.

    Gaps are small where the continued fraction of count / step has small terms, as that of the golden section.
    """

    def largest_term(step: int) -> int:
        terms, a, b = [0], count, step
        while b:
            terms.append(a // b)
            a, b = b, a % b
        return max(terms)

    strides = [step for step in range(1, count) if math.gcd(step, count) == 1]
    return min(strides, key=lambda step: (largest_term(step), abs(step - 0.618 * count)), default=1)


def hash_of(captions: Sequence[str]) -> str:
    """The sha256 of all captions."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()


class CocoFile(NamedTuple):
    """One of COCO's caption files: captions by image id, in its order, and names of image files where it has them."""

    captions: Mapping[int, str]
    names: Mapping[int, str]


def read_coco(path: Path) -> CocoFile:
    """Read a file like captions_val2014.json; of an image's captions, the one with the smallest id that is not blank.

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
            (_typed(a, "image_id", int), _typed(a, "id", int), _typed(a, "caption", str).strip())
            for a in _typed(content, "annotations", list)
        )
        names = {_typed(i, "id", int): _typed(i, "file_name", str) for i in content.get("images", [])}
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


def _typed(record: Any, key: str, kind: type) -> Any:
    """A value of a record; TypeError unless it is of this very type (a bool is no int)."""
    if type(value := record[key]) is not kind:
        raise TypeError(f"{key} must be of type {kind.__name__}, got {value!r:.60}")
    return value


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of a text file, one per line, or of a COCO annotation file (`.json`), one per image, in the order of image ids.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no captions, another encoding or format, a listed image without caption, or a blank line: left out, it would
            shift the captions after it.
    """
    expected = "give a text file with one caption a line (.txt), or COCO's captions_*.json"
    if not path.exists():
        raise FileNotFoundError(f"no captions at {path}: {expected}")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise ValueError(f"{path} is a table: {expected}")
    if suffix == ".json":
        captions, names = read_coco(path)
        if lacking := sorted(names.keys() - captions.keys()):
            raise ValueError(f"{path}: {len(lacking)} of {len(names)} images have no caption, first image {lacking[0]}")
        found = tuple(captions.values())
    elif _is_table(found := tuple(read_lines(path))):
        raise ValueError(f"{path} is a table: {expected}")
    # no visible character: spaces, controls (as DOS ends files with) and invisible marks alone
    blank = [i for i, text in enumerate(found, 1) if all(unicodedata.category(sign) in INVISIBLE for sign in text)]
    if len(blank) == len(found):
        raise ValueError(f"{path} holds no captions")
    if wrong := [number for number, caption in enumerate(found, 1) if NO_TEXT.search(caption)]:
        raise ValueError(f"{path}: caption {wrong[0]} has a character that is in no text: {found[wrong[0] - 1]!r:.60}")
    if blank:
        lines = (
            f"line {blank[0]} is blank" if len(blank) == 1 else f"{len(blank)} lines are blank, first line {blank[0]}"
        )
        raise ValueError(f"{path}: {lines}: line i is the caption of image i; give it one, or delete the line")
    return found


def _is_table(lines: Sequence[str]) -> bool:
    """Whether lines are JSON, in all or each, or rows that begin with the name of an image; the first may be a heading."""
    rows = lines[1:] or lines
    return _is_json("\n".join(lines)) or (bool(rows) and all(ROW.match(row) or _is_json(row) for row in rows))


def _is_json(text: str) -> bool:
    """Whether a text is a list or an object of JSON."""
    if not text.startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
