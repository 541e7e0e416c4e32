"""Which layers an engine executes, in integers mostly, and why it does not have the others: `sites.csv` of runs, in groups."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tfmq_exp.report.html.runs import SITES, Row, Run
from tfmq_exp.report.tables import engine_of, formats, label

FLOAT = "float"  # what a layer is executed in that the engine does not have
PRODUCTS = "attention products"  # the role of what is no layer: two products of activations
OWN_LINE = ("stem", "head", PRODUCTS)  # roles that share no line with other layers where an engine does not have them
Key = tuple[str, str, str]  # executed, role, why


@dataclass(frozen=True)
class Part:
    """Layers of which the same is to be said, or products of attention.

    Args:
        form: what they are multiplied in, such as int8; `float` where the engine does not have them.
        what: layers, or their role where it is one of `OWN_LINE`.
        bits: of their weights as they are stored, each once.
        why: the engine does not have them.
        names: in the network.
    """

    form: str
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
    def done(self) -> int:
        """Those that the engine executes."""
        return sum(len(part.names) for part in self.parts if part.form != FLOAT)

    @property
    def share(self) -> str:
        """How many of them, and in what."""
        layers = "layer" if self.layers == 1 else "layers"
        return f"{self.done} of {self.layers} {layers} in {formats(part.form for part in self.parts)}"


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
    """Rows by what is to be said of them: what the engine has first, then the most layers; what is no layer last."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        own = row["role"] in OWN_LINE and row["executed"] == FLOAT
        groups.setdefault((row["executed"], row["role"] if own else "layers", row["why"]), []).append(row)

    def order(item: tuple[Key, list[Row]]) -> tuple[bool, bool, int]:
        (how, role, _), some = item
        return how == FLOAT, role == PRODUCTS, -len(some)

    return tuple(
        Part(
            how,
            role,
            ", ".join(sorted({row["weight_bits"] for row in some if row["weight_bits"]})),
            why,
            tuple(row["site"] for row in some),
        )
        for (how, role, why), some in sorted(groups.items(), key=order)
    )
