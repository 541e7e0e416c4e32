"""Kinds of values of a configuration: each one once, as a test and in the words of its error. Light to import."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Kind:
    """A kind of value: `fits` says whether a value is one, `right` is its description in errors."""

    right: str
    fits: Callable[[Any], bool]


class WrongValueError(ValueError):
    """A field of a record with a value that it cannot have; `right` describes those that it can."""

    def __init__(self, record: str, field: str, right: str, value: Any) -> None:
        super().__init__(f"{record}.{field} must be {right}, got {value!r}")
        self.parts = (field, right, value)

    def under(self, key: str) -> str:
        """The message where the record's place in a configuration is known."""
        field, right, value = self.parts
        return f"{key}.{field} must be {right}, got {value!r}"


def check_fields(record: Any, **kinds: Kind) -> None:
    """Check fields of a record by name; WrongValueError for the first whose value is not of its kind."""
    for name, kind in kinds.items():
        if not kind.fits(value := getattr(record, name)):
            raise WrongValueError(type(record).__name__, name, kind.right, value)


def whole(value: Any) -> bool:
    """Whether a value is an integer; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    """Whether a value is a finite number; a truth value is none."""
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def optional(kind: Kind) -> Kind:
    """This kind, or null."""
    return Kind(f"{kind.right}, or null", lambda value: value is None or kind.fits(value))


def one_of(*values: Any) -> Kind:
    """Any of these values."""
    return Kind(f"one of {', '.join(map(str, values))}", lambda value: value in values)


def instance_of(*classes: type) -> Kind:
    """An instance of one of these classes."""
    return Kind(f"a {' or '.join(kind.__name__ for kind in classes)}", lambda value: isinstance(value, classes))


def sequence_of(kind: Kind) -> Kind:
    """A list or tuple of values of one kind."""
    fits = kind.fits
    return Kind(f"a list, each {kind.right}", lambda value: isinstance(value, list | tuple) and all(map(fits, value)))


MOST = 2**31  # of anything that is counted one by one
COUNT = Kind("a whole number, at least 1 and below 2**31", lambda value: whole(value) and 1 <= value < MOST)
ANY_COUNT = Kind("a whole number, at least 0 and below 2**31", lambda value: whole(value) and 0 <= value < MOST)
BYTES = Kind("a whole number of bytes, at least 1", lambda value: whole(value) and value >= 1)
SEED = Kind("a whole number from 0 to 2**63 - 1", lambda value: whole(value) and 0 <= value < 2**63)
POSITIVE = Kind("a number above 0", lambda value: number(value) and value > 0)
# Adam moves a parameter by about its rate: no weight, scale or rounding variable has a use for steps of 10
RATE = Kind("a number above 0, at most 10 (more diverges)", lambda value: number(value) and 0 < value <= 10)
# a higher power of an error vanishes in float32
POWER = Kind("a number above 0, at most 20", lambda value: number(value) and 0 < value <= 20)
AMOUNT = Kind("a number, at least 0", lambda value: number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: number(value) and 0 <= value <= 1)
POSITIVE_SHARE = Kind("a number above 0, at most 1", lambda value: number(value) and 0 < value <= 1)
INNER_SHARE = Kind("a number above 0 and below 1", lambda value: number(value) and 0 < value < 1)
DECAY = Kind("a number, at least 0 and below 1", lambda value: number(value) and 0 <= value < 1)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))


class Checked:
    """Base of a record. Checked are fields that are `Annotated` with a `Kind`, those that are a `Literal`, and truth values.

    Raises:
        WrongValueError: the first field whose value is not of its kind.
    """

    def __post_init__(self) -> None:
        check_fields(self, **kinds_of(type(self)))


@cache
def kinds_of(record: type) -> dict[str, Kind]:
    """Kinds of the checked fields of a record, by name."""

    def kind_of(hint: Any) -> Kind | None:
        if get_origin(hint) is Literal:
            return one_of(*get_args(hint))
        if get_origin(hint) is Annotated:
            return next((given for given in get_args(hint) if isinstance(given, Kind)), None)
        return SWITCH if hint is bool else None

    found = {name: kind_of(hint) for name, hint in get_type_hints(record, include_extras=True).items()}
    return {name: kind for name, kind in found.items() if kind}
