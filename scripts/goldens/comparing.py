"""Comparison with goldens: records of the keys that were read, differences, and their table."""

import math
import zlib
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

EXACT, ROUNDING = 0.0, 1e-6  # the same bits; the same numbers but for the order of float32 sums

WIDTH = 180  # characters

Values = Tensor | float | Sequence[float]


class DamagedError(Exception):
    """The folder lacks something, or something in it cannot be read."""


class Record(dict[str, Any]):
    """A dictionary that remembers what was read, and names what it lacks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        raise DamagedError(f"there is no {key!r} in the goldens")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error of a file or folder into a DamagedError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, yaml.YAMLError, SafetensorError) as error:
        reason = str(error)
        raise DamagedError(reason if str(path) in reason else f"{path} cannot be read: {reason}") from error


class Group:
    """The comparisons of one kind: how many, and the worst of them.

    Args:
        name: what the table calls it.
        tolerance: the largest difference that rounding explains.
        absolute: differences as they are, not relative to the largest magnitude of the golden tensor.
    """

    def __init__(self, name: str, tolerance: float, *, absolute: bool = False) -> None:
        self.name, self.tolerance, self.absolute = name, tolerance, absolute
        self.comparisons, self.values, self.worst, self.note = 0, 0, 0.0, ""

    def compare(self, ours: Values, golden: Values, magnified: float = 1.0, norm: float = math.inf) -> None:
        """Add one comparison.

        Args:
            ours: tensor, number or list of numbers.
            golden: the same of the original.
            magnified: how much larger rounding is than usual, where numbers come from a small difference of large ones.
            norm: of the difference and of the golden values: the largest (default) or 2.
        """
        a, b = (x.detach().double() if isinstance(x, Tensor) else torch.tensor(x).double() for x in (ours, golden))
        self.comparisons += 1
        self.values += b.numel()
        if a.numel() != b.numel():
            self.worst = math.inf
            return
        difference = (a.flatten() - b.flatten()).norm(norm)
        size = 1.0 if self.absolute else b.norm(norm)
        found = float(difference / size) / magnified if difference else 0.0
        self.worst = max(self.worst, math.inf if math.isnan(found) else found)

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it is within tolerance."""
        return self.comparisons > 0 and self.worst <= self.tolerance


def coverage(name: str, present: Set[str], read: Set[str]) -> Group:
    """Whether everything that is there took part in some comparison."""
    group, unread = Group(name, EXACT), sorted(present - read)
    group.compare(len(present) - len(unread), len(present))
    group.note = f"not read: {', '.join(unread[:3])}" if unread else ""
    return group


def print_groups(groups: Sequence[Group]) -> None:
    """One line per group; without a terminal, wide enough for all of it."""
    table = Table(title="differences from the original program", title_justify="left")
    for column in ("group", "comparisons", "values", "worst", "tolerance", "", "note"):
        table.add_column(column, justify="left" if column in ("group", "", "note") else "right")
    for g in groups:
        tolerance = f"{g.tolerance:.1e}{' abs' if g.absolute else ''}"
        numbers = (str(g.comparisons), str(g.values), f"{g.worst:.1e}", tolerance)
        table.add_row(g.name, *numbers, "ok" if g.ok else "FAILED", g.note)
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
