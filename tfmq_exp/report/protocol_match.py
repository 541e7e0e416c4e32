"""Match of records with published rows: the same method, and the same value in every protocol field that both name."""

import re
from collections.abc import Mapping
from typing import Any

from tfmq_exp.report.comparability import FLOAT, changed_choices
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.records import ScoreRecord

TIMESTEPS = 1000  # of every network in the published tables
SAMPLERS = {"DDIM": "ddim", "PLMS": "plms", "DPMSolver": "dpm_solver_{order}"}
SPACINGS = {"quad": "quadratic", "uniform": "uniform"}
INCEPTION = frozenset({"fid", "sfid", "is", "precision"})  # scores that the papers take from Inception's features
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


def is_of_row(record: ScoreRecord, row: PublishedRow, *, ablation: bool) -> bool:
    """Whether a record has the bits and the method of a published row, with exactly the changes that the row names.

    In an ablation a record's choices say which part of the method it has; elsewhere it may have no choices of its own.
    """
    choices, name = changed_choices(record), AS_PRINTED.get(record.method, record.method)
    if record.quant != row.bits or row.choices:
        return record.quant == row.bits and name == row.method and choices == row.choices
    if choices.keys() == {PARTITION, SCALES}:
        part = ABLATION.get((record.method, choices[PARTITION], choices[SCALES]))
        return part == row.method and (ablation or part == record.method)
    plain = not choices and not (ablation and record.method not in {FLOAT} | COMPLETE)
    return plain and name == row.method


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


def _steps(row: PublishedRow, record: ScoreRecord) -> tuple[Any, Any]:
    """Steps in the paper and here, compared by the network calls that they become."""
    theirs, ours = row.protocol.get("steps"), record.protocol.get("sampler", {}).get("num_inference_steps")
    published, calls = published_calls(row.protocol), record.protocol.get("network_calls")
    if theirs is None or ours is None or calls is None:
        return theirs, ours
    if published is None:  # a paper that names no sampler may count either
        return theirs, theirs if theirs in (ours, calls) else ours
    if published == calls:
        return theirs, theirs
    theirs, ours = (str(n) if n == made else f"{n} in {made} calls" for n, made in ((theirs, published), (ours, calls)))
    return theirs, ours


def evaluator_family(name: str) -> str:
    """Inception, whatever library runs it; any other evaluator is its own family."""
    return "Inception" if "inception" in name.lower() else name


def clip_network(folder: str | None) -> str | None:
    """The network that a folder is named after, as papers write it: clip-vit-base-patch32 is ViT-B/32."""
    found = re.fullmatch(r"clip-vit-(b|l|h|g)[a-z]*-patch(\d+)", folder or "")
    return f"ViT-{found[1].upper()}/{found[2]}" if found else folder


def protocol_differences(row: PublishedRow, record: ScoreRecord, score: str) -> list[str]:
    """Differences between the protocols, in words; fields that only one side names are not compared."""
    theirs, ours, evaluator = row.protocol, record.protocol, record.evaluator
    sampler: Mapping[str, Any] = ours.get("sampler", {})
    kind = sampler.get("class")
    when = ("before quantization", "with quantization")
    training = when["QAT" in row.title], when[record.cost.get("training_images") is not None]
    # of every field its value in the paper and here
    fields: dict[str, tuple[Any, Any]] = {
        "model": (row.model, record.model),
        "training": training if row.method != FLOAT else (None, None),
        "sampler": (theirs.get("sampler"), SAMPLERS[kind].format(**sampler) if kind in SAMPLERS else kind),
        "steps": _steps(row, record),
        "spacing": (SPACINGS.get(theirs.get("skip", "")), sampler.get("timestep_spacing")),
        "eta": (theirs.get("eta"), sampler.get("eta")),
        "guidance": (theirs.get("cfg"), ours.get("guidance")),
        "images": (theirs.get("images"), ours.get("images")),
    }
    if score in INCEPTION:
        fields["evaluator"] = theirs.get("evaluator", "Inception"), evaluator_family(evaluator["name"])
        fields["reference"] = theirs.get("reference"), evaluator.get("reference")
    if score == "clip":
        fields["CLIP network"] = (
            theirs.get("clip"),
            clip_network(evaluator.get("image_scores", {}).get("clip", {}).get("model")),
        )
    if score in COSTS:
        fields["device"] = theirs.get("device"), record.environment.get("device")

    def plain(value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    return [
        f"{name} {paper} in the paper, {here} here"
        for name, (paper, here) in fields.items()
        if paper is not None and here is not None and plain(paper) != plain(here)
    ]


def unstated_fields(row: PublishedRow) -> list[str]:
    """Fields of sampling that are not known of the published side."""
    eta = {"eta": 0} if row.protocol.get("sampler") == "plms" else {}  # PLMS has none
    return [name for name in ("sampler", "steps", "eta", "images") if (row.protocol | eta).get(name) is None]
