"""Dataclasses as plain data: what comes back is equal, anything else is refused by its place."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from tfmq_exp.core.records import decode, encode


class Shape:
    """A field that may hold one of several classes."""


@dataclass(frozen=True)
class Circle(Shape):
    kind: ClassVar[str] = "circle"
    radius: float


@dataclass(frozen=True)
class Square(Shape):
    kind: ClassVar[str] = "square"
    side: int = 1


@dataclass(frozen=True)
class Drawing:
    shapes: tuple[Shape, ...]
    named: Mapping[str, Shape | None] | None = None
    colour: Literal["black", "red"] = "black"
    size: int | None = None


CLASSES = (Drawing, Circle, Square)


@pytest.mark.parametrize(
    "drawing",
    [Drawing(()), Drawing((Circle(0.5), Square()), {"a": Square(3), "b": None}, "red", 7)],
)
def test_what_comes_back_is_equal(drawing: Drawing) -> None:
    assert decode(json.loads(json.dumps(encode(drawing, CLASSES))), Drawing, CLASSES) == drawing


def test_defaults_are_left_out() -> None:
    assert encode(Drawing((Square(), Square(2))), CLASSES) == {
        "shapes": [{"kind": "square"}, {"kind": "square", "side": 2}]
    }


def test_other_classes_are_not_stored() -> None:
    with pytest.raises(TypeError, match="a Square cannot be stored; classes that can: Drawing, circle"):
        encode(Drawing((Square(),)), (Drawing, Circle))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (3, "it must be Drawing, got '3'"),
        ({}, "it.shapes is missing"),
        ({"shapes": {}}, "it.shapes must be"),
        ({"shapes": [3]}, r"it.shapes\[0\] must be Shape"),
        ({"shapes": [{}]}, r"it.shapes\[0\]: unknown kind 'None'; known: circle, square"),
        ({"shapes": [{"kind": "star"}]}, "unknown kind 'star'"),
        ({"shapes": [{"kind": []}]}, "unknown kind"),
        ({"shapes": [{"kind": "square", "side": 1.0}]}, r"shapes\[0\].side must be int"),
        ({"shapes": [{"kind": "square", "side": True}]}, r"shapes\[0\].side must be int"),
        ({"shapes": [{"kind": "circle", "radius": "1"}]}, r"shapes\[0\].radius must be float"),
        ({"shapes": [], "colour": "blue"}, "it.colour must be"),
        ({"shapes": [], "size": "1"}, "it.size must be int"),
        ({"shapes": [], "novelty": 1}, "it.novelty is unknown"),
    ],
)
def test_what_is_no_record_is_named_by_its_place(data: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        decode(data, Drawing, CLASSES)
