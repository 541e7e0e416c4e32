"""Tables: what may stand together, and what a cell says."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from tfmq_exp.report.figures import mosaic
from tfmq_exp.report.records import ScoreRecord, read_records, save_records
from tfmq_exp.report.tables import by_protocol, cell, execution, pivot, render, table

FLOAT = ScoreRecord(
    model="m",
    quant="fp32",
    method="float",
    seed=0,
    scores={"fid": 1.0, "sfid": 2.0, "is": 9.0},
    protocol={"images": 8},
    evaluator={"name": "E", "reference": "R"},
    weights_bytes=400,
)


def record(method: str, quant: str, seed: int, fid: float, **changes: object) -> ScoreRecord:
    return dataclasses.replace(FLOAT, method=method, quant=quant, seed=seed, scores={"fid": fid}, **changes)


def test_mean_and_standard_deviation_over_seeds() -> None:
    header, rows = table([FLOAT, record("a", "w4a8", 0, 3.0), record("a", "w4a8", 1, 4.0), record("a", "w4a8", 2, 8.0)])
    assert header[:3] == ["bits", "method", "FID (E) ↓"]
    assert rows[1][2] == f"5.000 ± {statistics.stdev([3, 4, 8]):.3f}"
    assert rows[1][-1] == "3"


def test_the_float_row_comes_first_and_more_bits_before_fewer() -> None:
    _, rows = table([record("a", "w3a8", 0, 1), record("b", "w8a8", 0, 1), record("a", "w4a8", 0, 1), FLOAT])
    assert [row[:2] for row in rows] == [["fp32", "float"], ["w8a8", "b"], ["w4a8", "a"], ["w3a8", "a"]]


def test_missing_numbers_stay_empty() -> None:
    assert cell([None, None], 2) == "–"
    assert cell([None, 2.0], 1) == "2.0"


def test_a_constant_has_no_deviation() -> None:
    assert cell([64, 64, 64], 0) == "64"
    assert cell([64, 66], 0) == "65 ± 1"


def test_an_ablation_keeps_its_cells_apart() -> None:
    choices = [{"method/scales": "static"}, {"method/scales": "finite_set"}]
    _, rows = table([record("tfmq", "w4a8", 0, 1.0, choices=choice) for choice in choices])
    assert [row[1] for row in rows] == ["tfmq (method/scales=finite_set)", "tfmq (method/scales=static)"]


def test_different_protocols_never_share_a_table() -> None:
    other = dataclasses.replace(FLOAT, protocol={"images": 9})
    assert len(by_protocol([FLOAT, other])) == 2
    with pytest.raises(ValueError, match="different protocols"):
        table([FLOAT, other])


def test_markdown_and_csv() -> None:
    assert render(["a", "b"], [["1", "2"]], "markdown") == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert render(["a", "b"], [["1", "2,3"]], "csv").splitlines() == ["a,b", '1,"2,3"']
    with pytest.raises(ValueError, match="latex"):
        render(["a"], [], "latex")


def test_records_survive_their_file_and_a_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "results.json"
    path.write_text(json.dumps({"rows": [FLOAT.to_json()]}))
    assert read_records(tmp_path) == [FLOAT]
    path.write_text('{"rows": [{"model": "m"}]}')
    with pytest.raises(ValueError, match=r"results\.json"):
        read_records(tmp_path)


def test_the_same_scores_under_other_choices_are_another_row(tmp_path: Path) -> None:
    keys = {"scores": "one key"}
    plain, named = (
        record("tfmq", "w4a8", 0, 3.0, keys=keys, choices=choices) for choices in ({}, {"method/scales": "s"})
    )
    save_records([plain, named, plain], tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl") == [plain, named]


def test_a_mosaic_keeps_pixels_and_order() -> None:
    images = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 1, 2, 2)
    assert mosaic(images[:1], 1, gap=1).tolist() == [[0, 1, 96], [2, 3, 96], [96, 96, 96]]
    assert mosaic(images, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 0, 0], [10, 11, 0, 0]]


def test_saved_records_make_the_same_table(tmp_path: Path) -> None:
    other = dataclasses.replace(FLOAT, method="brecq", quant="w4a8", seed=1)
    save_records([FLOAT, other], tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl") == [FLOAT, other]


def test_a_pivot_has_methods_as_columns() -> None:
    records = [
        dataclasses.replace(FLOAT, method=method, quant=quant, seed=seed, scores={"fid": value + seed})
        for method, quant, value in (("a", "w4a8", 1.0), ("b", "w4a8", 3.0), ("a", "w8a8", 5.0))
        for seed in (0, 1)
    ]
    assert pivot(records, "fid", ["b", "a"]) == (
        ["bits", "b", "a"],
        [["w8a8", "–", "5.500 ± 0.707"], ["w4a8", "3.500 ± 0.707", "1.500 ± 0.707"]],
    )
    other = [dataclasses.replace(r, choices={"method/scales": "static"}) for r in records if r.quant == "w4a8"]
    assert pivot([*records, *other], "fid", ["a"]) == (
        ["bits", "a", "a (method/scales=static)"],
        [["w8a8", "5.500 ± 0.707", "–"], ["w4a8", "1.500 ± 0.707", "1.500 ± 0.707"]],
    )
    with pytest.raises(ValueError, match="no results of c; there are a, b"):
        pivot(records, "fid", ["c"])
    with pytest.raises(ValueError, match="'clip'"):
        pivot(records, "clip", ["a"])
    wrong = [dataclasses.replace(r, errors={"step": 0.01 * r.seed}) for r in records if r.method == "a"]
    assert pivot(wrong, "step", ["a"])[1][0][1].startswith(f"{sum(0.01 * r.seed for r in wrong) / len(wrong):.4f}")


def test_an_engines_row_is_called_so_and_never_averaged_with_its_simulation() -> None:
    simulated = [record("a", "w4a8", seed, 3.0 + seed, choices={"method/scales": "s"}) for seed in (0, 1)]
    executed = [
        dataclasses.replace(r, choices=r.choices | {"engine": "openvino"}, quantized={"layers_executed": share})
        for r, share in zip(simulated, (0.5, 1.0), strict=True)
    ]
    _, rows = table([FLOAT, *simulated, *executed])
    assert [row[1] for row in rows] == ["float", "a (method/scales=s)", "a (method/scales=s, executed by openvino)"]
    assert pivot([*simulated, *executed], "fid", ["a"])[0] == ["bits", rows[1][1], rows[2][1]]
    assert execution([FLOAT, *simulated]) == "simulated quantization"
    assert execution([FLOAT, *executed]) == "executed by openvino in integers (50% to 100% of their layers)"
    mixed = "simulated quantization; rows executed by openvino in integers (50% of their layers)"
    assert execution([FLOAT, *simulated, executed[0]]) == mixed
    other = dataclasses.replace(executed[0], quantized={"layers_executed": 0.25, "executed_in": ["fp8"]})
    assert execution([other]) == "executed by openvino in fp8 (25% of their layers)"


def test_seeds_of_one_training_are_averaged_and_two_trainings_are_not() -> None:
    def row(seed: int, fid: float, digest: str, named: str, method: str = "lsq") -> ScoreRecord:
        return record(method, "w4a4", seed, fid, settings={"hash": digest, "named": named})

    slow, fast = "experiment=short, qat_learning_rate=0.0001", "qat_learning_rate=0.001"
    rows = [row(0, 1.0, "a", slow), row(1, 3.0, "a", slow), row(0, 7.0, "b", fast), row(0, 9.0, "c", "", "qil")]
    _, found = table(rows)
    assert [(line[1], line[2], line[-1]) for line in found] == [
        (f"lsq [{slow}]", "2.000 ± 1.414", "2"),
        (f"lsq [{fast}]", "7.000", "1"),
        ("qil", "9.000", "1"),
    ]
    assert pivot(rows, "fid", ["lsq"]) == (
        ["bits", f"lsq [{slow}]", f"lsq [{fast}]"],
        [["w4a4", "2.000 ± 1.414", "7.000"]],
    )
    # what nobody named stands by its hash; records from before there were settings are no seeds of those
    assert [line[1] for line in table([row(0, 1.0, "a", ""), row(0, 2.0, "b", "")])[1]] == ["lsq [a]", "lsq [b]"]
    old = record("lsq", "w4a4", 1, 2.0)
    assert [line[1] for line in table([row(0, 1.0, "a", ""), old])[1]] == ["lsq [a]", "lsq [settings not noted]"]
    assert [line[1] for line in table([old])[1]] == ["lsq"]
