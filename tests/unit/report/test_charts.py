"""Arithmetic behind the page's charts, against slow or known answers."""

import random
from pathlib import Path

import pytest

from tfmq_exp.report.comparability import flatten
from tfmq_exp.report.html.charts import MAX_POINTS, METHODS, styles, thinned
from tfmq_exp.report.html.configurations import config_diffs
from tfmq_exp.report.html.run_reader import Run
from tfmq_exp.report.html.score_charts import bit_operations, front, labelled_points
from tfmq_exp.report.records import ScoreRecord

ROOT = Path(__file__).parents[3]


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


@pytest.mark.parametrize("count", [1, MAX_POINTS, MAX_POINTS + 1, 5003])
def test_thinned_curves_keep_their_ends(count: int) -> None:
    found = thinned(count)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, count - 1)
    assert len(found) == min(count, MAX_POINTS)


def test_looks_stay_apart() -> None:
    names = [f"method {i}" for i in range(18)]
    assert len(set(styles(names).values())) == len(names)
    assert styles(names) == styles(reversed(names))


def test_a_method_looks_alike_in_every_page() -> None:
    configured = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert set(METHODS) <= configured  # others look as their hash says
    assert len(set(styles(METHODS).values())) == len(METHODS)
    assert len({look.colour for look in styles(METHODS[:6]).values()}) == 6
    some = styles(["tfmq", "zebra", "s4", "tfmq (scales=static)"])
    for label, look in some.items():
        assert styles([label]) == {label: look}


def test_labels_of_points_do_not_meet() -> None:
    assert labelled_points([(1.0, 1.0), (1.001, 1.001), (2.0, 9.0), (2.0, 9.1)]) == {(1.0, 1.0), (2.0, 9.0)}
    assert labelled_points([(3.0, 3.0)]) == {(3.0, 3.0)}


def test_targets_are_named_inside_the_project() -> None:
    configs = [{"model": {"name": "m"}, "quant": {"_target_": f"tfmq_exp.quant.{name}"}} for name in ("A", "B")]
    found = config_diffs(
        [Run(name, Path(name), "done", config=config) for name, config in zip("ab", configs, strict=True)]
    )
    assert found[0]["rows"] == [(["quant._target_"], ("quant.A, quant.B",))]


def test_leaves_of_a_configuration_by_dotted_keys() -> None:
    config = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": {}, "g": "text"}
    assert flatten(config, ".") == {"a.b": 1, "a.c.d": None, "e": [1, 2], "f": {}, "g": "text"}
