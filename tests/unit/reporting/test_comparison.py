"""A published table beside ours: what may be subtracted, what stands in which cell, and what a footnote says."""

import csv
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pytest
from tfmq_exp.report.comparison import Cell, Comparison, choose, compare, listing
from tfmq_exp.report.comparison_text import MARKS, as_csv, as_markdown
from tfmq_exp.report.protocol_match import differing, published_calls, unstated
from tfmq_exp.report.published_tables import VERIFIED, PublishedRow, read_published
from tfmq_exp.report.records import ScoreRecord

ROOT = Path(__file__).parents[3]
PUBLISHED = read_published(ROOT / "conf" / "published")
BEDROOM = {"sampler": "ddim", "steps": 200, "eta": 1.0, "images": 50000}

OURS = ScoreRecord(
    model="m",
    quant="fp32",
    method="float",
    seed=0,
    scores={"fid": 3.0, "sfid": 7.0},
    protocol={
        "sampler": {"class": "DDIM", "steps": 200, "eta": 1.0, "spacing": "uniform"},
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
    text = as_markdown(compare([THEIRS], [OURS, quantized(3.5), quantized(3.7, 1)]))
    assert f"3.68 P \\| 3.60 ± {statistics.stdev([3.5, 3.7]):.2f} (2 seeds) \\| -0.08 |" in text
    assert "3.68 P \\| 3.50 (1 seed) \\| -0.18 |" in as_markdown(compare([THEIRS], [OURS, quantized(3.5)]))


def test_what_was_not_measured_is_a_dash_and_never_the_papers_number() -> None:
    comparison = compare([THEIRS], [])
    assert all(cell.ours == () and cell.difference is None for cell in cells(comparison).values())
    assert "| w4a8 | tfmq | 3.68 P \\| — \\| — | 7.65 P \\| — \\| — |" in as_markdown(comparison)
    assert only([THEIRS], [OURS, quantized(3.5)], "sfid").ours == ()
    for other in ({"model": "n"}, {"quant": "w8a8"}, {"method": "qdiff"}):
        assert only([THEIRS], [OURS, quantized(3.5, **other)]).ours == ()


@pytest.mark.parametrize(
    ("sampler", "protocol", "says"),
    [
        ({"class": "PLMS"}, {}, "sampler ddim in the paper, plms here"),
        ({"steps": 100}, {"network_calls": 100}, "steps 200 in the paper, 100 here"),
        ({"steps": 400}, {"network_calls": 500}, "steps 200 in the paper, 400 in 500 calls here"),
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
    text = as_markdown(compare([THEIRS], records))
    assert "\\| 3.50 (1 seed) \\| — [1]" in text
    assert f"[1] {says}" in text


def test_evaluator_and_reference_must_agree() -> None:
    digits = [dataclasses.replace(r, evaluator={"name": "digits features"}) for r in (OURS, quantized(3.5))]
    assert only([THEIRS], digits).notes == ("evaluator Inception in the paper, digits features here",)
    library = [dataclasses.replace(r, evaluator={"name": "Inception (torch)"}) for r in (OURS, quantized(3.5))]
    assert only([THEIRS], library).difference == pytest.approx(-0.18)
    other = row(protocol=BEDROOM | {"reference": "all of LSUN"})
    assert only([other], [OURS, quantized(3.5)]).notes == ("reference all of LSUN in the paper, LSUN here",)


@pytest.mark.parametrize(("folder", "agrees"), [("clip-vit-base-patch32", True), ("clip-vit-large-patch14", False)])
def test_clip_scores_of_different_networks_do_not_compare(folder: str, agrees: bool) -> None:
    theirs = row(protocol={"clip": "ViT-B/32"}, scores={"clip": 0.31})
    record = dataclasses.replace(OURS, evaluator=OURS.evaluator | {"clip": {"model": folder}})
    assert (differing(theirs, record, "clip") == []) is agrees


def test_guidance_spacing_and_training_count() -> None:
    assert differing(row(protocol={"cfg": 3.0}), OURS, "fid") == ["guidance 3.0 in the paper, 1.0 here"]
    quad = differing(row(protocol={"skip": "quad"}), OURS, "fid")
    assert quad == ["spacing quadratic in the paper, uniform here"]
    training = differing(row(title="Three seeds, QAT"), OURS, "fid")
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
    record = sampled(OURS, {"steps": steps}, network_calls=calls)
    assert (differing(row(protocol=theirs), record, "fid") == []) is agrees


def test_a_difference_says_what_the_paper_does_not() -> None:
    bare = row(protocol={"images": 50000})
    cell = only([bare], [OURS, quantized(3.5)])
    assert cell.difference == pytest.approx(-0.18)
    assert cell.notes == ("the paper's sampler, steps, eta not known",)
    assert unstated(row(protocol={"sampler": "plms", "steps": 50, "images": 1})) == []


def test_the_float_row_comes_first_and_its_absence_is_flagged() -> None:
    float_row = row(bits="fp32", method="float", scores={"fid": 2.98})
    comparison = compare([THEIRS, float_row], [OURS, quantized(3.5)])
    assert [line[:2] for line in comparison.lines] == [("fp32", "float"), ("w4a8", "tfmq")]
    assert comparison.notes == ()
    assert compare([THEIRS], []).notes == ("the table as known here has no float row of m",)
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
    found = cells(compare(choose(PUBLISHED, "TFMQ-DM", "5"), [*parts, plain]))
    ours = {method: found["w4a8", method, "ldm_bedroom", "fid"].ours for method in ("brecq", "tiar", "fsc", "tfmq")}
    assert ours == {"brecq": (9.0,), "tiar": (5.0,), "fsc": (6.0,), "tfmq": (4.0,)}
    first = cells(compare(choose(PUBLISHED, "TFMQ-DM", "1"), [*parts, plain]))
    assert first["w4a8", "brecq", "ldm_bedroom", "fid"].ours == (8.0,)
    assert only([THEIRS], [OURS, quantized(3.5, choices={"method/surgery": "outputs"})]).ours == ()


def test_an_interval_count_is_part_of_the_name() -> None:
    rows = choose(PUBLISHED, "tdq", "S4")
    ours = quantized(30.0, method="s4", model="ldm_church", choices={"method.scales.temporal.count": "4"}, seed=1)
    found = cells(compare(rows, [ours]))
    assert found["w4a8", "s4", "ldm_church", "fid"].ours == (30.0,)
    assert found["w4a8", "s10", "ldm_church", "fid"].ours == ()


def test_rows_that_print_the_same_score_stand_apart_and_others_together() -> None:
    found = cells(compare(choose(PUBLISHED, "TDQ", "S7"), []))
    methods = [method for _, method, _, _ in found]
    assert methods == ["tdq (He, the default)", "tdq (Gaussian, printed as fail)", "tdq (zero)", "tdq (Xavier)"]
    merged = cells(compare(choose(PUBLISHED, "TFMQ-DM", "cifar10"), []))
    fid, score = (merged["w4a8", "tfmq", "ddim_cifar10", name] for name in ("fid", "is"))
    assert (fid.paper, fid.verified, score.paper, score.verified) == (4.78, "secondary_notes", 9.13, "memory")


def test_a_variant_has_ours_only_where_it_is_known_to_be_it() -> None:
    rows = choose(PUBLISHED, "log of a user on GitHub", "user ffhq")
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
        trained(5.0, last="zero"),
        trained(6.0),
        trained(7.0, last="zero", dropout="0.0"),
        trained(9.0, last="gaussian"),
    ]
    found = cells(compare(choose(PUBLISHED, "TDQ", "S7"), ours))
    given = {method: (cell.paper, cell.ours) for (_, method, _, _), cell in found.items()}
    assert given == {
        "tdq (He, the default)": (4.48, ()),
        "tdq (Gaussian, printed as fail)": (None, (9.0,)),
        "tdq (zero)": (4.98, (5.0,)),
        "tdq (Xavier)": (4.90, ()),
    }
    assert "| — \\| 9.00 (1 seed) \\| — " in as_markdown(compare(choose(PUBLISHED, "TDQ", "S7"), ours))


def test_another_model_stands_beside_without_a_difference_and_with_bits_of_its_own() -> None:
    ours = [quantized(3.5, model="small"), quantized(9.0, model="m"), quantized(5.0, model="small", quant="w3a3")]
    found = cells(compare([THEIRS], ours, "small"))
    assert "ours are of small in every column" in as_markdown(compare([THEIRS], ours, "small"))
    beside, alone = found["w4a8", "tfmq", "m", "fid"], found["w3a3", "tfmq", "m", "fid"]
    assert (beside.paper, beside.ours, beside.difference) == (3.68, (3.5,), None)
    assert beside.notes[0] == "model m in the paper, small here"
    assert (alone.paper, alone.spread, alone.ours, alone.difference) == (None, None, (5.0,), None)
    assert {bits for bits, *_ in cells(compare([THEIRS], ours))} == {"w4a8"}


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


def test_papers_and_tables_are_found_by_name_and_errors_name_what_there_is() -> None:
    assert {r.model for r in choose(PUBLISHED, "tfmq", "2")} == {
        *("ldm_bedroom", "ldm_church", "ldm_celebahq", "ldm_ffhq")
    }
    assert choose(PUBLISHED, "q_diffusion", "2 AND 3") == choose(PUBLISHED, "Q-Diffusion", "2 and 3")
    with pytest.raises(ValueError, match="no table '9'; there are 1, 2, 3, 4, 5, 6, deployment, cifar10"):
        choose(PUBLISHED, "TFMQ-DM", "9")
    with pytest.raises(ValueError, match=r"no paper 'nothing'; there are .*PTQD.*TDQ, TFMQ-DM"):
        choose(PUBLISHED, "nothing", "1")
    with pytest.raises(ValueError, match="could be D2-DPM or DMQ"):
        choose([r for r in PUBLISHED if r.paper in ("D2-DPM", "DMQ")], "d", "1")


def test_every_published_table_is_written_with_a_known_mark() -> None:
    assert MARKS.keys() == VERIFIED
    assert len({mark for mark, _ in MARKS.values()}) == len(MARKS)
    for paper, tables in listing(PUBLISHED).items():
        for name in tables:
            rows = choose(PUBLISHED, paper, name)
            comparison = compare(rows, [])
            numbers = sum(cell.paper is not None for cell in cells(comparison).values())
            spreads = sum("fid_spread" in row.scores for row in rows)
            assert (
                numbers
                == sum(value is not None for row in rows for value in (row.scores | row.deltas).values()) - spreads
            )
            lines = [line for line in as_markdown(comparison).splitlines() if line.startswith("| ")]
            assert {line.replace("\\|", "").count("|") for line in lines} == {len(comparison.columns) + 3}
            assert "— (" not in as_markdown(comparison)


def test_markdown_prints_spread_marks_and_notes_once() -> None:
    text = as_markdown(compare(choose(PUBLISHED, "TDQ", "S6"), []))
    assert "| w3a3 | tdq | 6.67 ± 0.19 S \\| — \\| — [1] | 6.83 ± 0.11 S \\| — \\| — |" in text
    assert text.count("doubtful") == 1
    assert text.rstrip().endswith("Published numbers: S the paper's supplement.")


def test_csv_has_numbers_alone(tmp_path: Path) -> None:
    records = [OURS, quantized(3.5), quantized(3.7, 1)]
    header, line = csv.reader(as_csv(compare([THEIRS], records)).splitlines())
    found = dict(zip(header, line, strict=True))
    assert (found["bits"], found["method"]) == ("w4a8", "tfmq")
    parts = [found[f"m FID ↓ {part}"] for part in ("paper", "verified", "ours", "std", "seeds", "difference", "notes")]
    assert parts == ["3.68", "poster", "3.60", "0.14", "2", "-0.08", ""]
    assert found["m sFID ↓ ours"] == ""
