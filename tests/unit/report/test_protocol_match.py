"""Which fields of two protocols are compared, and how steps become network calls."""

import dataclasses
from typing import Any

import pytest

from tests.helpers.score_records import OURS, row, sampled
from tfmq_exp.report.protocol_match import protocol_differences, published_calls


@pytest.mark.parametrize(("folder", "agrees"), [("clip-vit-base-patch32", True), ("clip-vit-large-patch14", False)])
def test_clip_scores_of_different_networks_do_not_compare(folder: str, agrees: bool) -> None:
    theirs = row(protocol={"clip": "ViT-B/32"}, scores={"clip": 0.31})
    record = dataclasses.replace(OURS, evaluator=OURS.evaluator | {"image_scores": {"clip": {"model": folder}}})
    assert (protocol_differences(theirs, record, "clip") == []) is agrees


def test_guidance_spacing_and_training_count() -> None:
    assert protocol_differences(row(protocol={"cfg": 3.0}), OURS, "fid") == ["guidance 3.0 in the paper, 1.0 here"]
    quad = protocol_differences(row(protocol={"skip": "quad"}), OURS, "fid")
    assert quad == ["spacing quadratic in the paper, uniform here"]
    training = protocol_differences(row(title="Three seeds, QAT"), OURS, "fid")
    assert training == ["training with quantization in the paper, before quantization here"]


@pytest.mark.parametrize(
    ("protocol", "calls"),
    [
        ({"sampler": "ddim", "steps": 200}, 200),
        ({"sampler": "ddim", "steps": 400}, 500),
        ({"sampler": "plms", "steps": 50}, 51),
        ({"sampler": "ddim", "steps": 100, "skip": "quad"}, 100),
        ({"steps": 400}, None),
        ({"sampler": "ddim"}, None),
    ],
)
def test_steps_are_counted_as_network_calls(protocol: dict[str, Any], calls: int | None) -> None:
    assert published_calls(protocol) == calls


@pytest.mark.parametrize(
    ("theirs", "steps", "calls", "agrees"),
    [
        ({"sampler": "ddim", "steps": 400}, 400, 500, True),
        ({"sampler": "ddim", "steps": 400}, 500, 500, True),  # the same calls by another number
        ({"sampler": "ddim", "steps": 400}, 400, 400, False),  # really 400
        ({"steps": 500}, 400, 500, True),  # a paper that names no sampler may count either
        ({"steps": 400}, 400, 500, True),
        ({"steps": 250}, 400, 500, False),
    ],
)
def test_steps_agree_where_the_calls_do(theirs: dict[str, Any], steps: int, calls: int, agrees: bool) -> None:
    record = sampled(OURS, {"num_inference_steps": steps}, network_calls=calls)
    assert (protocol_differences(row(protocol=theirs), record, "fid") == []) is agrees
