"""Fields of records by their annotations."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest

from tfmq_exp.core.validate import COUNT, Checked, WrongValueError, optional


@dataclass(frozen=True)
class Wall(Checked):
    kind: ClassVar[str] = "wall"
    bricks: Annotated[int, COUNT]
    windows: Annotated[int | None, optional(COUNT)] = None
    paint: Literal["white", "grey"] = "white"
    dry: bool = True
    owner: str = ""


@dataclass(frozen=True)
class Tower(Wall):
    bricks: Annotated[int, COUNT] = 9


@pytest.mark.parametrize("record", [Wall, Tower])
@pytest.mark.parametrize(
    ("field", "value"),
    [("bricks", 0), ("bricks", True), ("windows", 0), ("paint", "red"), ("paint", []), ("dry", 1), ("dry", "yes")],
)
def test_a_wrong_value_is_named(record: type, field: str, value: Any) -> None:
    with pytest.raises(WrongValueError, match=f"^{record.__name__}.{field} must be .*, got "):
        record(**{"bricks": 1, field: value})


def test_right_values_and_fields_without_a_kind_pass() -> None:
    assert Wall(1, 2, "grey", False, "anyone") == Wall(1, 2, "grey", False, owner="anyone")
    assert Wall(1, owner=3).owner == 3  # type: ignore[arg-type]
