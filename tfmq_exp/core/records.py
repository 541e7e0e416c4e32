"""Frozen dataclasses as plain data (JSON), and back: strict, because what is read may come from anyone.

A dataclass becomes the mapping of those of its fields that differ from their defaults. Where a field may hold one of several classes,
each of these has a `kind`, which is stored with the fields.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def encode(value: Any, classes: Sequence[type]) -> Any:
    """A record as plain data; TypeError for one of a class that is not among `classes`."""
    if type(value) in classes:
        items = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        changed = {field.name: encode(item, classes) for field, item in items if item != field.default}
        return kind_of(type(value)) | changed
    if isinstance(value, Mapping):
        return {name: encode(item, classes) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, classes) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be stored; classes that can: {names_of(classes)}")


def decode(data: Any, hint: Any, classes: Sequence[type], place: str = "it") -> Any:
    """The inverse of `encode`, for a field that is annotated with `hint`; errors call it by its `place`.

    Raises:
        ValueError: a value of another type, an unknown kind, an unknown or missing field, or a value that its class refuses.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if type(data) in args and isinstance(data, int | float | None):  # nothing, or one of several kinds of numbers
            return data
        return decode(data, next(arg for arg in args if arg is not NoneType), classes, place)
    if origin is tuple and type(data) is list:
        return tuple(decode(item, args[0], classes, f"{place}[{i}]") for i, item in enumerate(data))
    if origin is Mapping and type(data) is dict:
        return {name: decode(item, args[1], classes, f"{place}.{name}") for name, item in data.items()}
    plain = type(data) is hint if hint in (int, str, bool) else hint is float and type(data) in (int, float)
    if plain or (origin is Literal and data in args):
        return data
    if not isinstance(hint, type) or getattr(hint, "_is_protocol", False) or type(data) is not dict:
        raise ValueError(f"{place} must be {getattr(hint, '__name__', hint)}, got {str(data)[:50]!r}")
    given = dict(data)
    fitting = [cls for cls in classes if issubclass(cls, hint) and kind_of(cls).items() <= given.items()]
    if not fitting:
        known = names_of([cls for cls in classes if issubclass(cls, hint)])
        raise ValueError(f"{place}: unknown kind {str(given.get('kind'))[:50]!r}; known: {known}")
    (cls,) = fitting
    given.pop("kind", None)
    hints, fields = get_type_hints(cls), dataclasses.fields(cls)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if wrong := (given.keys() - {field.name for field in fields}) or (required - given.keys()):
        raise ValueError(f"{place}.{min(wrong)} is {'unknown' if min(wrong) in given else 'missing'}")
    return cls(**{name: decode(item, hints[name], classes, f"{place}.{name}") for name, item in given.items()})


def kind_of(cls: type) -> dict[str, str]:
    return {"kind": cls.kind} if hasattr(cls, "kind") else {}  # type: ignore[attr-defined]


def names_of(classes: Sequence[type]) -> str:
    return ", ".join(getattr(cls, "kind", cls.__name__) for cls in classes)
