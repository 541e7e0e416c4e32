"""Records that differ in anything that decides a number are never averaged, and a reader is told which is which."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from scripts.make_tables import arguments, make_tables
from tfmq_exp.report.comparability import scored_by
from tfmq_exp.report.html.grouping import group_runs
from tfmq_exp.report.html.run_reader import Run
from tfmq_exp.report.records import ScoreRecord, read_records, save_records
from tfmq_exp.report.tables import by_protocol, devices, pivot, table

pytestmark = pytest.mark.bad_input

NETWORK = {
    "weights_sha256": "a" * 64,
    "settings": {"ema": False, "architecture_sha256": "b" * 64},
    "schedule": {"num_train_timesteps": 1000, "beta_start": 1e-4},
}
PROTOCOL = {
    "network": NETWORK,
    "sampler": {
        "class": "DDIM",
        "num_inference_steps": 20,
        "eta": 0.0,
        "timestep_spacing": "uniform",
        "steps_offset": 1,
    },
    "conditioning": {"class": "Unconditional"},
    "guidance": 1.0,
    "precision": "float32",
    "network_calls": 20,
    "images": 100,
    "uint8_rule": "round((x + 1) * 127.5)",
    "calibration_images": 64,
}
EVALUATOR = {
    "name": "E",
    "extractor_sha256": "c" * 64,
    "kid": False,
    "reference": "folder, 100 images of 8x8",
    "reference_provenance": {"pixels_sha256": "d" * 64},
}
ONE = ScoreRecord(
    model="diffusers",
    quant="w4a8",
    method="tfmq",
    seed=0,
    scores={"fid": 1.0},
    protocol=PROTOCOL,
    evaluator=EVALUATOR,
    weights_bytes=1,
    quantized={"weight_share": 1.0, "mac_share_outputs": 0.0},
    cost={"weight_iterations": 300, "weight_samples": 64, "quantization_seconds": 3.0},
    keys={"scores": "one"},
    environment={"device": "cpu"},
    settings={"hash": "1" * 8, "named": ""},
)


def replaced(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return tree | {key: replaced(tree[key], rest, value) if rest else value}


def other(field: str, path: str, value: Any) -> ScoreRecord:
    """Another seed of `ONE` in which one thing differs."""
    whole = getattr(ONE, field)
    changed = replaced(whole, path, value) if path else value
    return dataclasses.replace(ONE, seed=1, scores={"fid": 3.0}, keys={"scores": "two"}, **{field: changed})


COMPARABLE = [
    ("model", "", "another"),
    *(("protocol", path, value) for path, value in (
        ("network.weights_sha256", "e" * 64),
        ("network.settings.ema", True),
        ("network.settings.architecture_sha256", "e" * 64),
        ("network.schedule.beta_start", 2e-4),
        ("sampler.class", "PLMS"),
        ("sampler.num_inference_steps", 10),
        ("sampler.eta", 1.0),
        ("sampler.timestep_spacing", "quadratic"),
        ("sampler.steps_offset", 0),
        ("conditioning", {"class": "Classes", "count": 3}),
        ("guidance", 3.0),
        ("precision", "float16"),
        ("network_calls", 21),
        ("images", 50),
        ("uint8_rule", "truncate((x + 1) * 127.5)"),
        ("calibration_images", 32),
    )),
    *(("evaluator", path, value) for path, value in (
        ("name", "F"),
        ("extractor_sha256", "e" * 64),
        ("reference", "other"),
        ("reference_provenance.pixels_sha256", "e" * 64),
    )),
]  # fmt: skip
SETTING = [
    ("quant", "", "w8a8"),
    ("method", "", "qdiff"),
    ("choices", "", {"method/scales": "static"}),
    ("choices", "", {"engine": "openvino"}),
    ("settings", "hash", "2" * 8),
    ("settings", "", {}),
    ("cost", "weight_iterations", 5),
    ("cost", "weight_samples", 32),
    ("quantized", "weight_share", 0.5),
    ("quantized", "mac_share_outputs", 0.9),
    ("quantized", "engine", {"rest": "bf16"}),
]


@pytest.mark.parametrize(("field", "path", "value"), [*COMPARABLE, *SETTING])
def test_two_records_that_differ_in_one_thing_are_never_averaged(field: str, path: str, value: Any) -> None:
    pair = [ONE, other(field, path, value)]
    tables = [table(group)[1] for group in by_protocol(pair)]
    assert len(tables) == (2 if (field, path, value) in COMPARABLE else 1)
    rows = [row for rows in tables for row in rows]
    assert sorted(row[2] for row in rows) == ["1.000", "3.000"]
    assert [row[-1] for row in rows] == ["1", "1"]
    found = group_runs([Run("r", Path(), "done", records=(record,)) for record in pair])
    assert [len(variant.records) for group in found for variant in group.variants] == [1, 1]
    headings = [
        f"{g.first.model} {g.title} {scored_by(g.first)} {variant.bits} {variant.label}"
        for g in found
        for variant in g.variants
    ]
    assert len(set(headings)) == 2


def test_without_a_difference_they_are() -> None:
    same = other("weights_bytes", "", 1)
    assert table([ONE, same])[1][0][2::14] == ["2.000 ± 1.414", "2"]


@pytest.mark.parametrize("form", ["markdown", "csv"])
@pytest.mark.parametrize(("field", "path", "value"), COMPARABLE)
def test_a_printed_table_says_which_it_is(
    field: str, path: str, value: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_records([ONE, other(field, path, value)], tmp_path / "r.jsonl")
    monkeypatch.setattr("sys.argv", ["make_tables.py", str(tmp_path / "r.jsonl"), "--format", form])
    text = make_tables(arguments())
    lines = [line for line in text.splitlines() if ("**" in line if form == "markdown" else ",tfmq," in line)]
    assert len({line.replace("3.000", "1.000") for line in lines}) == 2
    if path == "network.weights_sha256":
        assert "network weights sha256 aaaaaaaa" in text
        assert "network weights sha256 eeeeeeee" in text


def test_a_network_that_was_not_noted_is_another() -> None:
    old = other("protocol", "", {k: v for k, v in PROTOCOL.items() if k != "network"})
    assert len(by_protocol([ONE, old])) == 2
    first, second = group_runs([Run("r", Path(), "done", records=(ONE, old))])
    assert "network weights sha256 aaaaaaaa" in first.title
    assert "network weights sha256 not noted" in second.title


def test_labels_say_what_tells_settings_apart() -> None:
    def names(*records: ScoreRecord) -> list[str]:
        return [row[1] for row in table(records)[1]]

    old = dataclasses.replace(ONE, settings={}, seed=1)
    assert names(ONE, old) == ["tfmq [11111111]", "tfmq [settings not noted]"]
    shorter = dataclasses.replace(old, cost=ONE.cost | {"weight_iterations": 5})
    assert names(old, shorter) == ["tfmq [weight iterations 300]", "tfmq [weight iterations 5]"]
    assert len(set(names(ONE, old, shorter))) == 3


def test_a_run_that_was_repeated_is_no_further_seed() -> None:
    def run(seed: int, fid: float, key: str) -> ScoreRecord:
        return dataclasses.replace(ONE, seed=seed, scores={"fid": fid}, keys={"scores": key})

    records = [run(0, 1.0, "a"), run(1, 2.0, "b"), run(1, 5.0, "c"), run(1, 5.0, "d")]
    row = table(records)[1][0]
    assert (row[2], row[-1]) == ("3.000 ± 2.828", "2 (1 more run of them left out)")
    assert pivot(records, "fid", ["tfmq"])[1] == [["w4a8", "3.000 ± 2.828 (1 more run of them left out)"]]
    assert group_runs([Run("r", Path(), "done", records=tuple(records))])[0].variants[0].left_out == 2


def test_float_rows_of_other_judges_and_of_other_numbers_are_kept(tmp_path: Path) -> None:
    plain = dataclasses.replace(ONE, method="float", quant="fp32", keys={}, settings={}, quantized={}, cost={})
    judged = dataclasses.replace(plain, evaluator=EVALUATOR | {"name": "F"})
    elsewhere = dataclasses.replace(plain, scores={"fid": 1.5}, environment={"device": "NVIDIA H200"})
    save_records([plain, judged, elsewhere, plain], tmp_path / "r.jsonl")
    assert read_records(tmp_path / "r.jsonl") == [plain, judged, elsewhere]
    assert devices([plain, judged]) == ""
    assert devices([plain, elsewhere]) == "made on NVIDIA H200 and cpu"
