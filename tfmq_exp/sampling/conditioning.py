"""Conditions of the images of a run: the class or caption of image i."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.sampling.caption_files import read_captions

Order = Literal["in_turn", "random"]


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


def _picks(order: Order, count: int, seed: int, stream: str, indices: Iterable[int]) -> list[int]:
    if order not in ("in_turn", "random"):
        raise ValueError(f"order must be in_turn or random, got {order!r}")
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
        check_fields(self, count=COUNT)

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> list[int]:
        stride = spreading_stride(self.count)
        return [pick * stride % self.count for pick in _picks(self.order, self.count, seed, stream, indices)]


@dataclass(frozen=True)
class Captions:
    """Captions of a file. `sha256` is that of all captions: results of a changed file are not mistaken for those of the old one."""

    path: str
    sha256: str
    order: Order = "in_turn"

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


def hash_of(captions: Sequence[str]) -> str:
    """The sha256 of all captions."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
