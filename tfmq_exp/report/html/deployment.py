"""Layers that an engine executes, and why it leaves the others: `sites.csv` of runs, in groups."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from tfmq_exp.report.comparability import engine_of, group_by, label
from tfmq_exp.report.html.run_reader import SITES, Row, Run
from tfmq_exp.report.tables import executed_dtypes

LEFT = "float"  # the dtype of layers that the engine does not execute
PRODUCTS = "attention products"  # the role of entries that are no layers: two products of activations
OWN_GROUP = ("stem", "head", PRODUCTS)  # roles with a group of their own where the engine leaves them


class LayerGroup(NamedTuple):
    """Layers, or products of attention, that are executed alike."""

    dtype: str  # such as int8; `float` where the engine does not execute them
    role: str  # layers, or one of `OWN_GROUP`
    bits: str  # of their weights as they are stored, each once
    why: str  # the engine does not execute them
    names: list[str]  # in the network


class Deployment(NamedTuple):
    """A model on an engine; `runs` are all with the very same table."""

    title: str
    engine: str
    runs: list[str]
    groups: list[LayerGroup]  # executed ones first, larger groups before smaller; products of attention last
    layers: int
    executed: int
    share: str  # number and dtypes of the executed layers, in words


def deployments(runs: Sequence[Run]) -> list[Deployment]:
    """One for every variant and table; runs that differ in their seeds mostly share theirs."""
    deployed = [run for run in runs if SITES in run.tables]
    tables = group_by(deployed, lambda run: json.dumps([_title(run), run.engine, run.tables[SITES]], sort_keys=True))
    found: list[Deployment] = []
    for same in tables.values():
        groups: list[LayerGroup] = []
        for (dtype, role, why), sites in group_by(same[0].tables[SITES], _execution).items():
            bits = ", ".join(sorted({site["weight_bits"] for site in sites} - {""}))
            groups.append(LayerGroup(dtype, role, bits, why, [site["site"] for site in sites]))
        groups.sort(key=lambda each: (each.role == PRODUCTS, each.dtype == LEFT, -len(each.names)))
        of_layers = [group for group in groups if group.role != PRODUCTS]
        layers = sum(len(group.names) for group in of_layers)
        executed = sum(len(group.names) for group in of_layers if group.dtype != LEFT)
        dtypes = executed_dtypes(group.dtype for group in of_layers)
        share = f"{executed} of {layers} {'layer' if layers == 1 else 'layers'} in {dtypes}"
        names = [run.name for run in same]
        found.append(Deployment(_title(same[0]), same[0].engine, names, groups, layers, executed, share))
    return found


def _execution(site: Row) -> tuple[str, str, str]:
    own = site["role"] == PRODUCTS or (site["role"] in OWN_GROUP and site["executed"] == LEFT)
    return site["executed"], site["role"] if own else "layers", site["why"]


def _title(run: Run) -> str:
    """Model, bits and method as in the engine's record, or else from the configuration."""
    for record in filter(engine_of, run.records):
        return f"{record.model} {record.quant} {label(record, 'method')}"
    names = " ".join(run.configured(group) for group in ("model", "quant", "method"))
    return f"{names} (executed by {run.engine or '?'})"
