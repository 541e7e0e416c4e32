"""Match of records with published rows: the same method, and the same value in every protocol field that both name."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import FLOAT, changed_choices

TIMESTEPS = 1000  # of every network in the published tables
SAMPLERS = {"DDIM": "ddim", "PLMS": "plms", "DPMSolver": "dpm_solver_{order}"}
SPACINGS = {"quad": "quadratic", "uniform": "uniform"}
INCEPTION = frozenset({"fid", "sfid", "is", "precision"})  # scores that the papers take from Inception's features
IMAGE_SCORES = INCEPTION | {"clip"}
COSTS = frozenset({"gpu_hours", "latency_s", "speedup", "memory_mb"})

# TFMQ-DM's table 5 in the choices of the preset that makes it; the baseline has the same surgery as the other cells
PARTITION, SCALES = "method/weights/partition", "method/scales"
ABLATION = {
    ("tfmq", "blockwise", "static"): "brecq",
    ("tfmq", "temporal_aware", "static"): "tiar",
    ("tfmq", "blockwise", "finite_set"): "fsc",
    ("tfmq", "temporal_aware", "finite_set"): "tfmq",
}
COMPLETE = {method for (method, *_), name in ABLATION.items() if name == method}  # methods with all of their parts
# the method of TDQ's paper and its baseline, under training: LSQ with another source of scales
AS_PRINTED = {"lsq_tdq": "tdq", "lsq_dynamic": "dynamic"}

Field = tuple[str, Any, Any]  # a field of the protocol, its value in the paper and here


def published_name(record: ScoreRecord, *, ablation: bool) -> str | None:
    """The published name of a record's method; None for variants that no table has.

    In an ablation a record's choices say which part of the method it has; elsewhere it may have no choices of its own.
    """
    choices = changed_choices(record)
    if choices.keys() == {PARTITION, SCALES}:
        name = ABLATION.get((record.method, choices[PARTITION], choices[SCALES]))
        return name if ablation or name == record.method else None
    if choices or (ablation and record.method not in {FLOAT} | COMPLETE):
        return None
    return AS_PRINTED.get(record.method, record.method)


def is_of_row(record: ScoreRecord, row: PublishedRow, *, ablation: bool) -> bool:
    """Whether a record has the bits and the method of a published row, with exactly the changes that the row names."""
    if record.quant != row.bits:
        return False
    if row.choices:
        return AS_PRINTED.get(record.method, record.method) == row.method and changed_choices(record) == row.choices
    return published_name(record, ablation=ablation) == row.method


def published_calls(protocol: Mapping[str, Any]) -> int | None:
    """Network calls that a published number of steps becomes; None without a known sampler.

    LDM and DDIM visit every (T // steps)-th timestep: 400 steps become 500 calls. PLMS adds one.
    """
    steps, sampler = protocol.get("steps"), protocol.get("sampler")
    if steps is None or sampler not in ("ddim", "plms"):
        return None
    if protocol.get("skip") == "quad":
        return steps
    return len(range(0, TIMESTEPS, TIMESTEPS // steps)) + (sampler == "plms")


def _steps(row: PublishedRow, record: ScoreRecord) -> Field:
    """Steps, compared by the network calls that they become."""
    theirs, ours = row.protocol.get("steps"), record.protocol.get("sampler", {}).get("num_inference_steps")
    published, calls = published_calls(row.protocol), record.protocol.get("network_calls")
    if theirs is None or ours is None or calls is None:
        return "steps", theirs, ours
    if published is None:  # a paper that names no sampler may count either
        return "steps", theirs, theirs if theirs in (ours, calls) else ours
    if published == calls:
        return "steps", theirs, theirs

    def counted(steps: int, calls: int) -> str:
        return str(steps) if steps == calls else f"{steps} in {calls} calls"

    return "steps", counted(theirs, published), counted(ours, calls)


def evaluator_family(name: str) -> str:
    """Inception, whatever library runs it; any other evaluator is its own family."""
    return "Inception" if "inception" in name.lower() else name


def clip_network(folder: str | None) -> str | None:
    """The network that a folder is named after, as papers write it: clip-vit-base-patch32 is ViT-B/32."""
    found = re.fullmatch(r"clip-vit-(b|l|h|g)[a-z]*-patch(\d+)", folder or "")
    return f"ViT-{found[1].upper()}/{found[2]}" if found else folder


def _training(quantized: bool) -> str:
    return "with quantization" if quantized else "before quantization"


def _fields(row: PublishedRow, record: ScoreRecord, score: str) -> Iterator[Field]:
    theirs, ours = row.protocol, record.protocol
    sampler: Mapping[str, Any] = ours.get("sampler", {})
    kind = sampler.get("class")
    yield "model", row.model, record.model
    if row.method != FLOAT:
        yield "training", _training("QAT" in row.title), _training(record.cost.get("training_images") is not None)
    yield "sampler", theirs.get("sampler"), SAMPLERS[kind].format(**sampler) if kind in SAMPLERS else kind
    yield _steps(row, record)
    yield "spacing", SPACINGS.get(theirs.get("skip", "")), sampler.get("timestep_spacing")
    yield "eta", theirs.get("eta"), sampler.get("eta")
    yield "guidance", theirs.get("cfg"), ours.get("guidance")
    yield "images", theirs.get("images"), ours.get("images")
    if score in INCEPTION:
        yield "evaluator", theirs.get("evaluator", "Inception"), evaluator_family(record.evaluator["name"])
        yield "reference", theirs.get("reference"), record.evaluator.get("reference")
    if score == "clip":
        yield "CLIP network", theirs.get("clip"), clip_network(record.evaluator.get("clip", {}).get("model"))
    if score in COSTS:
        yield "device", theirs.get("device"), record.environment.get("device")


def protocol_differences(row: PublishedRow, record: ScoreRecord, score: str) -> list[str]:
    """Differences between the protocols, in words; fields that only one side names are not compared."""

    def plain(value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    return [
        f"{name} {theirs} in the paper, {ours} here"
        for name, theirs, ours in _fields(row, record, score)
        if theirs is not None and ours is not None and plain(theirs) != plain(ours)
    ]


def unstated_fields(row: PublishedRow) -> list[str]:
    """Fields of sampling that are not known of the published side."""
    eta = {"eta": 0} if row.protocol.get("sampler") == "plms" else {}  # PLMS has none
    protocol = row.protocol | eta
    return [name for name in ("sampler", "steps", "eta", "images") if protocol.get(name) is None]
