"""A record of ours and a published row that match, and variations of them."""

import dataclasses
from typing import Any

from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.records import ScoreRecord

BEDROOM = {"sampler": "ddim", "steps": 200, "eta": 1.0, "images": 50000}

OURS = ScoreRecord(
    model="m",
    quant="fp32",
    method="float",
    seed=0,
    scores={"fid": 3.0, "sfid": 7.0},
    protocol={
        "sampler": {"class": "DDIM", "num_inference_steps": 200, "eta": 1.0, "timestep_spacing": "uniform"},
        "network_calls": 200,
        "guidance": 1.0,
        "images": 50000,
    },
    evaluator={"name": "Inception", "reference": "LSUN"},
    weights_bytes=400,
)
THEIRS = PublishedRow("P", "R", "1", "T", "m", "w4a8", "tfmq", {"fid": 3.68, "sfid": 7.65}, {}, "poster", BEDROOM, "")


def row(**changes: Any) -> PublishedRow:
    return dataclasses.replace(THEIRS, **changes)


def quantized(fid: float, seed: int = 0, **changes: Any) -> ScoreRecord:
    given = {"method": "tfmq", "quant": "w4a8", "seed": seed, "scores": {"fid": fid}, "keys": {"images": f"{fid}"}}
    return dataclasses.replace(OURS, **(given | changes))


def sampled(record: ScoreRecord, sampler: dict[str, Any] | None = None, **protocol: Any) -> ScoreRecord:
    whole = record.protocol | {"sampler": record.protocol["sampler"] | (sampler or {})} | protocol
    return dataclasses.replace(record, protocol=whole)
