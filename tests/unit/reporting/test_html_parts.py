"""Arithmetic behind the page's charts, against slow or known answers."""

import random

import pytest

from tfmq_exp.reporting.html.chart import POINTS, kept
from tfmq_exp.reporting.html.configurations import flat
from tfmq_exp.reporting.html.palette import looks
from tfmq_exp.reporting.html.score_charts import bit_operations, front
from tfmq_exp.reporting.records import ScoreRecord


def test_the_front_is_what_no_other_point_beats() -> None:
    draw = random.Random(0)
    points = [(draw.randrange(20) / 4, draw.randrange(20) / 4) for _ in range(60)]
    unbeaten = {
        (x, y) for x, y in points if not any(other != (x, y) and other[0] <= x and other[1] <= y for other in points)
    }
    found = front(points)
    assert set(found) == unbeaten
    assert found == sorted(found)


def test_bit_operations_count_integers_by_their_widths() -> None:
    common = {"model": "m", "seed": 0, "scores": {}, "protocol": {}, "evaluator": {}, "weights_bytes": 1}
    quantized = {"mac_share_weights_and_inputs": 0.75}
    record = ScoreRecord(quant="w4a8", method="a", quantized=quantized, **common)
    assert bit_operations(record) == pytest.approx((0.75 * 4 * 8 + 0.25 * 32 * 32) / (32 * 32))
    assert bit_operations(ScoreRecord(quant="fp32", method="float", **common)) == 1
    assert bit_operations(ScoreRecord(quant="w4a8", method="a", **common)) is None
    assert bit_operations(ScoreRecord(quant="w4a468", method="a", quantized=quantized, **common)) is None


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 5003])
def test_thinned_curves_keep_their_ends(count: int) -> None:
    found = kept(count)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, count - 1)
    assert len(found) == min(count, POINTS)


def test_looks_stay_apart() -> None:
    names = [f"method {i}" for i in range(18)]
    assert len(set(looks(names).values())) == len(names)
    assert looks(names) == looks(reversed(names))


def test_leaves_of_a_configuration_by_dotted_keys() -> None:
    config = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": {}, "g": "text"}
    assert dict(flat(config)) == {"a.b": "1", "a.c.d": "null", "e": "[1, 2]", "f": "{}", "g": "text"}
