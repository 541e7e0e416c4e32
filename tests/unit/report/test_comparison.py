"""A published table beside ours: what may be subtracted, what stands in which cell, and what a footnote says."""

import csv
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.score_records import BEDROOM, OURS, THEIRS, quantized, row, sampled
from tfmq_exp.report.comparison import Cell, Comparison, compare, comparison_csv, comparison_markdown
from tfmq_exp.report.protocol_match import unstated_fields
from tfmq_exp.report.published_tables import VERIFIED, PublishedRow, find_table, read_published, tables_by_paper
from tfmq_exp.report.records import ScoreRecord

PUBLISHED = read_published()


def cells(comparison: Comparison) -> dict[tuple[str, str, str, str], Cell]:
    return {
        (bits, method, *column): cell
        for bits, method, line in comparison.lines
        for column, cell in zip(comparison.columns, line, strict=True)
    }


def only(rows: list[PublishedRow], records: list[ScoreRecord], score: str = "fid") -> Cell:
    return cells(compare(rows, records))["w4a8", "tfmq", "m", score]


def test_seeds_give_mean_deviation_and_difference() -> None:
    cell = only([THEIRS], [OURS, *(quantized(fid, seed) for seed, fid in enumerate([3.5, 3.7, 4.2]))])
    assert cell.ours == (3.5, 3.7, 4.2)
    assert cell.difference == pytest.approx(statistics.mean([3.5, 3.7, 4.2]) - 3.68)
    assert cell.notes == ()
    text = comparison_markdown(compare([THEIRS], [OURS, quantized(3.5), quantized(3.7, 1)]))
    assert f"3.68 P \\| 3.60 ± {statistics.stdev([3.5, 3.7]):.2f} (2 seeds) \\| -0.08 |" in text
    assert "3.68 P \\| 3.50 (1 seed) \\| -0.18 |" in comparison_markdown(compare([THEIRS], [OURS, quantized(3.5)]))


def test_what_was_not_measured_is_a_dash_and_never_the_papers_number() -> None:
    comparison = compare([THEIRS], [])
    assert all(cell.ours == () and cell.difference is None for cell in cells(comparison).values())
    assert "| w4a8 | tfmq | 3.68 P \\| — \\| — | 7.65 P \\| — \\| — |" in comparison_markdown(comparison)
    assert only([THEIRS], [OURS, quantized(3.5)], "sfid").ours == ()
    for other in ({"model": "n"}, {"quant": "w8a8"}, {"method": "qdiff"}):
        assert only([THEIRS], [OURS, quantized(3.5, **other)]).ours == ()


@pytest.mark.parametrize(
    ("sampler", "protocol", "says"),
    [
        ({"class": "PLMS"}, {}, "sampler ddim in the paper, plms here"),
        ({"num_inference_steps": 100}, {"network_calls": 100}, "steps 200 in the paper, 100 here"),
        ({"num_inference_steps": 400}, {"network_calls": 500}, "steps 200 in the paper, 400 in 500 calls here"),
        ({"eta": 0.0}, {}, "eta 1.0 in the paper, 0.0 here"),
        ({}, {"images": 24}, "images 50000 in the paper, 24 here"),
    ],
)
def test_no_difference_where_a_field_of_the_protocol_differs(
    sampler: dict[str, Any], protocol: dict[str, Any], says: str
) -> None:
    records = [sampled(record, sampler, **protocol) for record in (OURS, quantized(3.5))]
    cell = only([THEIRS], records)
    assert (cell.ours, cell.difference, cell.notes) == ((3.5,), None, (says,))
    text = comparison_markdown(compare([THEIRS], records))
    assert "\\| 3.50 (1 seed) \\| — [1]" in text
    assert f"[1] {says}" in text


def test_evaluator_and_reference_must_agree() -> None:
    digits = [dataclasses.replace(r, evaluator={"name": "digits features"}) for r in (OURS, quantized(3.5))]
    assert only([THEIRS], digits).notes == ("evaluator Inception in the paper, digits features here",)
    library = [dataclasses.replace(r, evaluator={"name": "Inception (torch)"}) for r in (OURS, quantized(3.5))]
    assert only([THEIRS], library).difference == pytest.approx(-0.18)
    other = row(protocol=BEDROOM | {"reference": "all of LSUN"})
    assert only([other], [OURS, quantized(3.5)]).notes == ("reference all of LSUN in the paper, LSUN here",)


def test_a_difference_says_what_the_paper_does_not() -> None:
    bare = row(protocol={"images": 50000})
    cell = only([bare], [OURS, quantized(3.5)])
    assert cell.difference == pytest.approx(-0.18)
    assert cell.notes == ("the paper's sampler, steps, eta not known",)
    assert unstated_fields(row(protocol={"sampler": "plms", "steps": 50, "images": 1})) == []


def test_the_float_row_comes_first_and_its_absence_is_flagged() -> None:
    float_row = row(bits="fp32", method="float", scores={"fid": 2.98})
    comparison = compare([THEIRS, float_row], [OURS, quantized(3.5)])
    assert [line[:2] for line in comparison.lines] == [("fp32", "float"), ("w4a8", "tfmq")]
    assert comparison.notes == []
    assert compare([THEIRS], []).notes == ["the table as known here has no float row of m"]
    flag = ("no float row of ours under this protocol and evaluator",)
    assert only([THEIRS], [quantized(3.5)]).notes == flag
    elsewhere = dataclasses.replace(OURS, evaluator={"name": "digits features"})
    assert only([THEIRS], [elsewhere, quantized(3.5)]).notes == flag


def test_the_nearest_experiment_is_taken_and_experiments_are_never_averaged() -> None:
    small = [sampled(record, images=24) for record in (OURS, quantized(9.0))]
    assert only([THEIRS], [*small, OURS, quantized(3.5)]).ours == (3.5,)
    released = quantized(5.0, 1, quantized={"weight_share": 0.8})
    cell = only([THEIRS], [OURS, quantized(3.5), released])
    assert len(cell.ours) == 1
    assert cell.notes == ("one of 2 experiments of ours, which differ in coverage, effort or protocol",)
    again = only([THEIRS], [OURS, quantized(3.5), quantized(3.9)])
    assert (again.ours, again.notes) == ((3.9,), ("of several runs with one seed, the last",))


def test_an_ablation_is_read_from_choices_and_other_variations_fill_no_cell() -> None:
    def part(partition: str, scales: str, fid: float) -> ScoreRecord:
        choices = {"method/weights/partition": partition, "method/scales": scales}
        return quantized(fid, choices=choices, model="ldm_bedroom")

    parts = [
        part("blockwise", "static", 9.0),
        part("temporal_aware", "static", 5.0),
        part("blockwise", "finite_set", 6.0),
        part("temporal_aware", "finite_set", 4.0),
    ]
    plain = quantized(8.0, method="brecq", model="ldm_bedroom")
    found = cells(compare(find_table(PUBLISHED, "TFMQ-DM", "5"), [*parts, plain]))
    ours = {method: found["w4a8", method, "ldm_bedroom", "fid"].ours for method in ("brecq", "tiar", "fsc", "tfmq")}
    assert ours == {"brecq": (9.0,), "tiar": (5.0,), "fsc": (6.0,), "tfmq": (4.0,)}
    first = cells(compare(find_table(PUBLISHED, "TFMQ-DM", "1"), [*parts, plain]))
    assert first["w4a8", "brecq", "ldm_bedroom", "fid"].ours == (8.0,)
    assert only([THEIRS], [OURS, quantized(3.5, choices={"method/surgery": "outputs"})]).ours == ()


def test_an_interval_count_is_part_of_the_name() -> None:
    rows = find_table(PUBLISHED, "tdq", "S4")
    ours = quantized(30.0, method="s4", model="ldm_church", choices={"method.scales.temporal.count": "4"}, seed=1)
    found = cells(compare(rows, [ours]))
    assert found["w4a8", "s4", "ldm_church", "fid"].ours == (30.0,)
    assert found["w4a8", "s10", "ldm_church", "fid"].ours == ()


def test_rows_that_print_the_same_score_stand_apart_and_others_together() -> None:
    found = cells(compare(find_table(PUBLISHED, "TDQ", "S7"), []))
    methods = [method for _, method, _, _ in found]
    assert methods == ["tdq (He, the default)", "tdq (Gaussian, printed as fail)", "tdq (zero)", "tdq (Xavier)"]
    merged = cells(compare(find_table(PUBLISHED, "TFMQ-DM", "cifar10"), []))
    fid, score = (merged["w4a8", "tfmq", "ddim_cifar10", name] for name in ("fid", "is"))
    assert (fid.paper, fid.verified, score.paper, score.verified) == (4.78, "secondary_notes", 9.13, "memory")


def test_a_variant_has_ours_only_where_it_is_known_to_be_it() -> None:
    rows = find_table(PUBLISHED, "log of a user on GitHub", "user ffhq")
    ours = [sampled(quantized(6.0, model="ldm_ffhq", quant="w8a8"), {"eta": 0.0})]
    found = cells(compare(rows, ours))
    assert found["w8a8", "tfmq (50000 images)", "ldm_ffhq", "fid"].difference == pytest.approx(6.0 - 5.968)
    assert found["w8a8", "tfmq (5000 images)", "ldm_ffhq", "fid"].ours == ()


def test_a_variant_is_known_by_what_is_changed_in_the_method() -> None:
    def trained(fid: float, **choices: str) -> ScoreRecord:
        start = {f"method.scales.temporal.{key}": value for key, value in choices.items()}
        changes = {"model": "ddim_cifar10", "quant": "w4a4", "method": "lsq_tdq", "choices": start}
        return quantized(fid, cost={"training_images": 50000}, **changes)

    ours = [
        trained(5.0, last_layer_init="zero"),
        trained(6.0),
        trained(7.0, last_layer_init="zero", dropout="0.0"),
        trained(9.0, last_layer_init="gaussian"),
    ]
    found = cells(compare(find_table(PUBLISHED, "TDQ", "S7"), ours))
    given = {method: (cell.paper, cell.ours) for (_, method, _, _), cell in found.items()}
    assert given == {
        "tdq (He, the default)": (4.48, ()),
        "tdq (Gaussian, printed as fail)": (None, (9.0,)),
        "tdq (zero)": (4.98, (5.0,)),
        "tdq (Xavier)": (4.90, ()),
    }
    assert "| — \\| 9.00 (1 seed) \\| — " in comparison_markdown(compare(find_table(PUBLISHED, "TDQ", "S7"), ours))


def test_another_model_stands_beside_without_a_difference_and_with_bits_of_its_own() -> None:
    ours = [quantized(3.5, model="small"), quantized(9.0, model="m"), quantized(5.0, model="small", quant="w3a3")]
    found = cells(compare([THEIRS], ours, "small"))
    assert "ours are of small in every column" in comparison_markdown(compare([THEIRS], ours, "small"))
    beside, alone = found["w4a8", "tfmq", "m", "fid"], found["w3a3", "tfmq", "m", "fid"]
    assert (beside.paper, beside.ours, beside.difference) == (3.68, (3.5,), None)
    assert beside.notes[0] == "model m in the paper, small here"
    assert (alone.paper, alone.spread, alone.ours, alone.difference) == (None, None, (5.0,), None)
    assert {bits for bits, *_ in cells(compare([THEIRS], ours))} == {"w4a8"}
    assert compare([row(bits="fp32", method="float")], ours, "small").lines[0][:2] == ("fp32", "float")
    changes = compare(find_table(PUBLISHED, "TFMQ-DM", "5"), ours, "small")
    assert {cell.paper for (bits, *_), cell in cells(changes).items() if bits == "w3a3"} == {None}
    assert "| w3a3 | tiar | — |" in comparison_markdown(changes)


def test_scales_and_costs() -> None:
    text = row(scores={"clip": 0.3128, "gpu_hours": 2.0, "size_mb": 800.0}, protocol={"device": "one H800 GPU"})
    ours = quantized(
        3.5,
        scores={"clip": 31.0},
        cost={"quantization_seconds": 5400},
        environment={"device": "NVIDIA H200"},
        weights_bytes=820 * 2**20,
    )
    found = cells(compare([text], [OURS, ours]))
    assert found["w4a8", "tfmq", "m", "clip"].ours == pytest.approx((0.31,))
    assert found["w4a8", "tfmq", "m", "gpu_hours"].ours == (1.5,)
    assert found["w4a8", "tfmq", "m", "gpu_hours"].difference is None
    assert found["w4a8", "tfmq", "m", "size_mb"].difference == 20.0
    cpu = dataclasses.replace(ours, environment={"device": "cpu"})
    assert cells(compare([text], [OURS, cpu]))["w4a8", "tfmq", "m", "gpu_hours"].ours == ()


def test_every_published_table_is_written_with_a_known_mark() -> None:
    assert len({mark for mark, _ in VERIFIED.values()}) == len(VERIFIED)
    for paper, tables in tables_by_paper(PUBLISHED).items():
        for name in tables:
            rows = find_table(PUBLISHED, paper, name)
            comparison = compare(rows, [])
            numbers = sum(cell.paper is not None for cell in cells(comparison).values())
            spreads = sum("fid_spread" in row.scores for row in rows)
            assert (
                numbers
                == sum(value is not None for row in rows for value in (row.scores | row.deltas).values()) - spreads
            )
            lines = [line for line in comparison_markdown(comparison).splitlines() if line.startswith("| ")]
            assert {line.replace("\\|", "").count("|") for line in lines} == {len(comparison.columns) + 3}
            assert "— (" not in comparison_markdown(comparison)


def test_markdown_prints_spread_marks_and_notes_once() -> None:
    text = comparison_markdown(compare(find_table(PUBLISHED, "TDQ", "S6"), []))
    assert "| w3a3 | tdq | 6.67 ± 0.19 S \\| — \\| — [1] | 6.83 ± 0.11 S \\| — \\| — |" in text
    assert text.count("doubtful") == 1
    assert text.rstrip().endswith("Published numbers: S the paper's supplement.")


def test_csv_has_numbers_alone(tmp_path: Path) -> None:
    records = [OURS, quantized(3.5), quantized(3.7, 1)]
    header, line = csv.reader(comparison_csv(compare([THEIRS], records)).splitlines())
    found = dict(zip(header, line, strict=True))
    assert (found["bits"], found["method"]) == ("w4a8", "tfmq")
    parts = [found[f"m FID ↓ {part}"] for part in ("paper", "verified", "ours", "std", "seeds", "difference", "notes")]
    assert parts == ["3.68", "poster", "3.60", "0.14", "2", "-0.08", ""]
    assert found["m sFID ↓ ours"] == ""
