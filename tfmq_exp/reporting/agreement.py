"""Whether a number of ours was made as a published one: the fields that both sides name, one by one."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.records import ScoreRecord

TIMESTEPS = 1000  # of every network in the published tables
SAMPLERS = {"DDIM": "ddim", "PLMS": "plms", "DPMSolver": "dpm_solver_{order}"}
SPACINGS = {"quad": "quadratic", "uniform": "uniform"}
INCEPTION = frozenset({"fid", "sfid", "is", "precision"})  # scores that the papers take from Inception's features
QUALITY = INCEPTION | {"clip"}  # scores of images

Pair = tuple[str, Any, Any]  # a field, what the paper says of it, and what the record does


def published_calls(protocol: Mapping[str, Any]) -> int | None:
    """Network calls that a published number of steps becomes; None where the sampler is not named.

    LDM and DDIM visit every (T // steps)-th timestep: 400 steps become 500 calls. PLMS adds one.
    """
    steps, sampler = protocol.get("steps"), protocol.get("sampler")
    if steps is None or sampler not in ("ddim", "plms"):
        return None
    if protocol.get("skip") == "quad":
        return steps
    return len(range(0, TIMESTEPS, TIMESTEPS // steps)) + (sampler == "plms")


def _steps(row: PublishedRow, record: ScoreRecord) -> Pair:
    """Steps, as the calls that they become."""
    theirs, ours = row.protocol.get("steps"), record.protocol.get("sampler", {}).get("steps")
    made, calls = published_calls(row.protocol), record.protocol.get("network_calls")
    if theirs is None or ours is None or calls is None:
        return "steps", theirs, ours
    if made is None:  # a paper that names no sampler may count either
        return "steps", theirs, theirs if theirs in (ours, calls) else ours
    if made == calls:
        return "steps", theirs, theirs
    return "steps", _counted(theirs, made), _counted(ours, calls)


def _counted(steps: int, calls: int) -> str:
    return str(steps) if steps == calls else f"{steps} in {calls} calls"


def evaluator_family(name: str) -> str:
    """Inception, whatever library runs it; any other evaluator is its own family."""
    return "Inception" if "inception" in name.lower() else name


def clip_network(folder: str | None) -> str | None:
    """The network that a folder is named after, as papers write it: clip-vit-base-patch32 is ViT-B/32."""
    found = re.fullmatch(r"clip-vit-(b|l|h|g)[a-z]*-patch(\d+)", folder or "")
    return f"ViT-{found[1].upper()}/{found[2]}" if found else folder


def _pairs(row: PublishedRow, record: ScoreRecord, score: str) -> Iterator[Pair]:
    theirs, ours = row.protocol, record.protocol
    sampler: Mapping[str, Any] = ours.get("sampler", {})
    kind = sampler.get("class")
    yield "model", row.model, record.model
    if row.method != "float":
        yield "training", trained("QAT" in row.title), trained(record.cost.get("training_images") is not None)
    yield "sampler", theirs.get("sampler"), SAMPLERS[kind].format(**sampler) if kind in SAMPLERS else kind
    yield _steps(row, record)
    yield "spacing", SPACINGS.get(theirs.get("skip", "")), sampler.get("spacing")
    yield "eta", theirs.get("eta"), sampler.get("eta")
    yield "guidance", theirs.get("cfg"), ours.get("guidance")
    yield "images", theirs.get("images"), ours.get("images")
    if score in INCEPTION:
        yield "evaluator", theirs.get("evaluator", "Inception"), evaluator_family(record.evaluator["name"])
        yield "reference", theirs.get("reference"), record.evaluator.get("reference")
    if score == "clip":
        yield "CLIP network", theirs.get("clip"), clip_network(record.evaluator.get("clip", {}).get("model"))
    if score in ("gpu_hours", "latency_s", "speedup", "memory_mb"):
        yield "device", theirs.get("device"), record.environment.get("device")


def trained(with_quantizers: bool) -> str:
    """Whether quantizers were in the network while it was trained, in words."""
    return "with quantization" if with_quantizers else "before quantization"


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return theirs == ours


def differing(row: PublishedRow, record: ScoreRecord, score: str) -> list[str]:
    """What differs between the protocols, in words; fields that only one side names are not compared."""
    return [
        f"{name} {theirs} in the paper, {ours} here"
        for name, theirs, ours in _pairs(row, record, score)
        if theirs is not None and ours is not None and not _same(theirs, ours)
    ]


SAMPLING: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "sampler": lambda protocol: protocol.get("sampler"),
    "steps": lambda protocol: protocol.get("steps"),
    "eta": lambda protocol: 0 if protocol.get("sampler") == "plms" else protocol.get("eta"),  # PLMS has none
    "images": lambda protocol: protocol.get("images"),
}


def unstated(row: PublishedRow) -> list[str]:
    """Fields of sampling that nothing is known of on the published side."""
    return [name for name, read in SAMPLING.items() if read(row.protocol) is None]
