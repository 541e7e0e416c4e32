"""Layers that an engine executes, and why it leaves the others: `sites.csv` of runs, in groups."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.html.run_reader import SITES, Row, Rows, Run
from tfmq_exp.report.tables import engine_of, executed_dtypes, label

LEFT = "float"  # the dtype of layers that the engine does not execute
PRODUCTS = "attention products"  # the role of entries that are no layers: two products of activations
OWN_GROUP = ("stem", "head", PRODUCTS)  # roles with a group of their own where the engine leaves them


class LayerGroup(NamedTuple):
    """Layers, or products of attention, that are executed alike.

    Args:
        dtype: such as int8; `float` where the engine does not execute them.
        role: layers, or one of `OWN_GROUP`.
        bits: of their weights as they are stored, each once.
        why: the engine does not execute them.
        names: in the network.
    """

    dtype: str
    role: str
    bits: str
    why: str
    names: tuple[str, ...]


class Deployment(NamedTuple):
    """A model on an engine; `runs` are all with the very same table."""

    title: str
    engine: str
    runs: tuple[str, ...]
    groups: tuple[LayerGroup, ...]

    @property
    def layers(self) -> int:
        return sum(len(group.names) for group in self.groups if group.role != PRODUCTS)

    @property
    def executed(self) -> int:
        return sum(len(group.names) for group in self.groups if group.dtype != LEFT)

    @property
    def share(self) -> str:
        """Number and dtypes of the executed layers, in words."""
        layers = "layer" if self.layers == 1 else "layers"
        return f"{self.executed} of {self.layers} {layers} in {executed_dtypes(group.dtype for group in self.groups)}"


def deployments(runs: Sequence[Run]) -> list[Deployment]:
    """One for every variant and table; runs that differ in their seeds mostly share theirs."""
    deployed = [run for run in runs if SITES in run.tables]
    groups = group_by(deployed, lambda run: json.dumps([_title(run), run.engine, run.tables[SITES]], sort_keys=True))
    return [
        Deployment(
            _title(same[0]), same[0].engine, tuple(run.name for run in same), _layer_groups(same[0].tables[SITES])
        )
        for same in groups.values()
    ]


def _title(run: Run) -> str:
    """Model, bits and method as in the engine's record, or else from the configuration."""
    for record in run.records:
        if engine_of(record):
            return f"{record.model} {record.quant} {label(record, 'method')}"
    names = " ".join(run.configured(group) for group in ("model", "quant", "method"))
    return f"{names} (executed by {run.engine or '?'})"


def _layer_groups(rows: Rows) -> tuple[LayerGroup, ...]:
    """Groups of layers by execution: executed ones first, larger groups before smaller; products of attention last."""

    def key(row: Row) -> tuple[str, str, str]:
        own = row["role"] in OWN_GROUP and row["executed"] == LEFT
        return row["executed"], row["role"] if own else "layers", row["why"]

    found: list[LayerGroup] = []
    for (dtype, role, why), same in group_by(rows, key).items():
        bits = ", ".join(sorted({row["weight_bits"] for row in same} - {""}))
        found.append(LayerGroup(dtype, role, bits, why, tuple(row["site"] for row in same)))
    return tuple(sorted(found, key=lambda each: (each.dtype == LEFT, each.role == PRODUCTS, -len(each.names))))
