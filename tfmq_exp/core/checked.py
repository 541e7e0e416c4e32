"""Records (frozen dataclasses) whose fields are checked by their annotations."""

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tfmq_exp.core.validate import SWITCH, Kind, check_fields, one_of


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
