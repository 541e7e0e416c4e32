"""Which layers an engine executes in integers, and why it does not have the others: `sites.csv` of runs, in groups."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tfmq_exp.reporting.html.runs import SITES, Row, Run
from tfmq_exp.reporting.tables import engine_of, label

INTEGER = "int8"
PRODUCTS = "attention products"  # the role of what is no layer: two products of activations
OWN_LINE = ("stem", "head", PRODUCTS)  # roles that share no line with other layers where they stay float
Key = tuple[str, str, str]  # executed, role, why


@dataclass(frozen=True)
class Part:
    """Layers of which the same is to be said, or products of attention.

    Args:
        integer: whether both operands are integers when they are multiplied.
        what: layers, or their role where it is one of `OWN_LINE`.
        bits: of their weights as they are stored, each once.
        why: they are executed in floating point.
        names: in the network.
    """

    integer: bool
    what: str
    bits: str
    why: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Executed:
    """A model on an engine; `runs` are all that have the very same table."""

    title: str
    engine: str
    runs: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def layers(self) -> int:
        """All with weights."""
        return sum(len(part.names) for part in self.parts if part.what != PRODUCTS)

    @property
    def integer(self) -> int:
        """Those that are executed in integers."""
        return sum(len(part.names) for part in self.parts if part.integer)


def executed(runs: Sequence[Run]) -> list[Executed]:
    """One for every way and table; runs that differ in their seeds mostly share theirs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if rows := run.tables.get(SITES):
            found.setdefault(json.dumps([title(run), run.engine, rows], sort_keys=True), []).append(run)
    return [
        Executed(title(some[0]), some[0].engine, tuple(run.name for run in some), parts(some[0].tables[SITES]))
        for some in found.values()
    ]


def title(run: Run) -> str:
    """Model, bits, and the method as the engine's row is called; from the configuration where there are no scores."""
    for record in run.records:
        if engine_of(record):
            return f"{record.model} {record.quant} {label(record, 'method')}"
    return f"{run.choice('model')} {run.choice('quant')} {run.choice('method')} (executed by {run.engine or '?'})"


def parts(rows: Sequence[Row]) -> tuple[Part, ...]:
    """Rows by what is to be said of them: integers first, then the most layers; what is no layer last."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        integer = row["executed"] == INTEGER
        own = row["role"] in OWN_LINE and not integer
        groups.setdefault((row["executed"], row["role"] if own else "layers", row["why"]), []).append(row)

    def order(item: tuple[Key, list[Row]]) -> tuple[bool, bool, int]:
        (how, role, _), some = item
        return how != INTEGER, role == PRODUCTS, -len(some)

    return tuple(
        Part(
            how == INTEGER,
            role,
            ", ".join(sorted({row["weight_bits"] for row in some if row["weight_bits"]})),
            why,
            tuple(row["site"] for row in some),
        )
        for (how, role, why), some in sorted(groups.items(), key=order)
    )
