"""What the images of a run are conditioned on: which class or caption image i has."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from tfmq_exp.sampling.seeds import derive_seed

Order = Literal["in_turn", "random"]


class Conditioning(Protocol):
    """A plan of conditions."""

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> Sequence[Any]:
        """The labels or captions of images `indices` of a stream; they depend on nothing else."""
        ...


@dataclass(frozen=True)
class Unconditional:
    """Images are conditioned on nothing."""

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> Sequence[Any]:
        """Nothing."""
        return ()


def _picks(order: Order, count: int, seed: int, stream: str, indices: Iterable[int]) -> list[int]:
    if order not in ("in_turn", "random"):
        raise ValueError(f"order must be in_turn or random, got {order!r}")
    if order == "in_turn":
        return [i % count for i in indices]
    return [derive_seed(seed, stream, "condition", i) % count for i in indices]


@cache
def spreading_stride(count: int) -> int:
    """The step whose multiples, modulo `count`, visit everything once and leave no large gap at any time.

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
        if self.count < 1:
            raise ValueError(f"there must be at least one class, got {self.count}")

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> list[int]:
        """Labels."""
        stride = spreading_stride(self.count)
        return [pick * stride % self.count for pick in _picks(self.order, self.count, seed, stream, indices)]


@cache
def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of a text file, one a line, or of a COCO annotation file (`.json`), one an image, in the order of image ids.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none in it, or another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no captions at {path}: give a text file with one a line, or COCO's captions_*.json")
    if path.suffix == ".json":
        try:
            annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
            first: dict[int, str] = {}
            for annotation in sorted(annotations, key=lambda a: (a["image_id"], a["id"])):
                first.setdefault(annotation["image_id"], annotation["caption"].strip())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a COCO caption file: {type(error).__name__} {error}") from error
        found = tuple(first.values())
    else:
        found = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not found:
        raise ValueError(f"{path} holds no captions")
    return found


@dataclass(frozen=True)
class Captions:
    """Captions of a file. `sha256` is that of all of them, so that a changed file is another protocol."""

    path: str
    sha256: str
    order: Order = "in_turn"

    @classmethod
    def read(cls, path: str, order: Order = "in_turn") -> "Captions":
        """The plan of a file; see `read_captions`."""
        captions = read_captions(Path(path))
        return cls(path, hashlib.sha256("\n".join(captions).encode()).hexdigest(), order)

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> list[str]:
        """Captions."""
        captions = read_captions(Path(self.path))
        return [captions[i] for i in _picks(self.order, len(captions), seed, stream, indices)]
