"""Published numbers: cells, counts and sums of the real files, and what the reader refuses."""

import re
from collections import Counter
from pathlib import Path

import pytest
from tfmq_exp.report.published_tables import PublishedRow, read_published

FOLDER = Path(__file__).parents[3] / "conf" / "published"
ROWS = read_published(FOLDER)

REVIEW = "Diffusion Model Quantization review"
# paper, table, model, bits, method: scores, verified. Typed again, not copied from the files.
CELLS: list[tuple[str, dict[str, float], str]] = [
    ("TFMQ-DM|1|ldm_bedroom|w8a8|freeze", {"fid": 5.76, "sfid": 8.42}, "poster"),
    ("TFMQ-DM|1|ldm_bedroom|w4a8|brecq", {"fid": 9.36, "sfid": 22.73}, "poster"),
    ("TFMQ-DM|2|ldm_bedroom|fp32|float", {"fid": 2.98, "sfid": 7.09}, "poster"),
    ("TFMQ-DM|2|ldm_bedroom|w4a8|ptq4dm", {"fid": 20.72, "sfid": 54.30}, "poster"),
    ("TFMQ-DM|2|ldm_bedroom|w4a8|tfmq", {"fid": 3.68, "sfid": 7.65}, "poster"),
    ("TFMQ-DM|2|ldm_church|w8a8|ptqd", {"fid": 4.89, "sfid": 14.89}, "poster"),
    ("TFMQ-DM|2|ldm_celebahq|w4a32|ptqd", {"fid": 11.06, "sfid": 12.21}, "poster"),
    ("TFMQ-DM|2|ldm_ffhq|w4a8|qdiff", {"fid": 11.45, "sfid": 11.15}, "poster"),
    ("TFMQ-DM|2|ldm_ffhq|w8a8|tfmq", {"fid": 9.46, "sfid": 8.73}, "poster"),
    ("TFMQ-DM|3|ldm_imagenet|w8a8|ptq4dm", {"is": 161.75, "fid": 12.59}, "poster"),
    ("TFMQ-DM|3|ldm_imagenet|w4a32|ptqd", {"is": 201.78, "fid": 11.65, "sfid": 9.06}, "poster"),
    ("TFMQ-DM|4|sd_v1_4|w4a8|tfmq", {"fid": 13.36, "sfid": 20.14, "clip": 0.3128}, "poster"),
    ("TFMQ-DM|6|ldm_bedroom|w4a8|ptqd", {"gpu_hours": 4.68}, "memory"),
    ("TFMQ-DM|deployment|sd_v1_4|w8a8|tfmq", {"size_mb": 821.77, "latency_s": 34.07, "speedup": 2.38}, "page"),
    ("TFMQ-DM|cifar10|ddim_cifar10|w4a32|ptq4dm", {"fid": 5.65}, "secondary_notes"),
    ("TFMQ-DM|cifar10|ddim_cifar10|w8a8|tfmq", {"fid": 4.24, "is": 9.07}, "memory"),
    ("Q-Diffusion|1|ddim_cifar10|w8a8|squant", {"fid": 464.69, "is": 1.17}, "memory"),
    ("Q-Diffusion|2 and 3|ldm_church|w8a8|qdiff", {"fid": 3.65}, "memory"),
    ("Q-Diffusion|2 and 3|ldm_bedroom|w4a32|linear", {"fid": 82.69}, "memory"),
    ("PTQD|imagenet 20 steps|ldm_imagenet|fp32|float", {"is": 225.16, "fid": 12.45, "sfid": 7.85}, "memory"),
    ("PTQD|imagenet 250 steps|ldm_imagenet|fp32|float", {"fid": 5.05}, "secondary"),
    ("PTQD|lsun|ldm_church|mixed|ptqd", {"fid": 17.99}, "secondary_notes"),
    ("PTQD|ablation|unstated|mixed|ptqd", {"fid": 6.44, "sfid": 8.43}, "secondary_notes"),
    ("PTQD|latency|unstated|w4a4|ptqd", {"speedup": 3.34}, "secondary_notes"),
    ("TDQ|S1|ddim_cifar10|w4a4|dynamic", {"fid": 6.21, "is": 9.11}, "supplement"),
    ("TDQ|S4|ldm_church|w4a6|s2", {"fid": 193.11}, "supplement"),
    ("TDQ|S4|ldm_imagenet|w4a6|tdq_thin", {"fid": 16.96}, "supplement"),
    ("TDQ|S5|ddim_cifar10|w4a4|qil_tdq", {"fid": 7.51}, "supplement"),
    ("TDQ|S6|ldm_church|w3a3|tdq", {"fid": 6.83, "fid_spread": 0.11}, "supplement"),
    ("TDQ|1 cifar10|ddim_cifar10|w8a4|nipq", {"fid": 6.36, "is": 9.59}, "memory"),
    ("TDQ|1 church|ldm_church|w4a4|tdq", {"fid": 4.64}, "secondary_notes"),
    ("TDQ|2|ldm_church|w8a5|ptq4dm", {"fid": 7.06}, "secondary_notes"),
    ("TDQ|text|ddim_cifar10|w4a4|dynamic", {"fid": 6.30}, "secondary_notes"),
    ("GAC|GAC bedroom|ldm_bedroom|w4a8|gac", {"fid": 3.26, "sfid": 7.40}, "secondary_notes"),
    ("QuEST|QuEST 3|ldm_church|w8a8|ptq4dm", {"fid": 63.93}, "full_text"),
    ("QuEST|QuEST 5|sd_v1_4|w4a8|qdiff", {"clip": 31.39}, "full_text"),
    ("QuEST|QuEST imagenet|ldm_imagenet|w4a8|quest", {"is": 354.97, "fid": 8.48, "sfid": 6.55}, "full_text"),
    ("QuEST|QuEST cost|ldm_bedroom|w4a8|quest", {"gpu_hours": 15.25, "memory_mb": 12178.0}, "full_text"),
    ("QNCD|QNCD imagenet|ldm_imagenet|w4a6|qncd", {"is": 136.49, "fid": 20.14}, "image"),
    (
        "SA-QLoRA|SA-QLoRA imagenet|ldm_imagenet|w4a4|sa_qlora",
        {"is": 242.03, "fid": 13.73, "sfid": 12.45},
        "secondary_notes",
    ),
    (f"{REVIEW}|review unconditional|ldm_bedroom|w4a8|ptqd", {"fid": 12.57, "sfid": 16.04}, "image"),
    (f"{REVIEW}|review imagenet|ldm_imagenet|w4a8|tfmq", {"is": 194.43, "fid": 17.63, "sfid": 43.10}, "image"),
    (f"{REVIEW}|review text-guided|sd_v1_4|w8a8|tfmq", {"fid": 14.62, "sfid": 23.05, "clip": 0.2852}, "image"),
    ("DMQ|DMQ re-run|ldm_imagenet|w4a8|tfmq", {"is": 342.1, "fid": 9.51, "sfid": 8.10}, "secondary_notes"),
]

# Cells of the printed tables that hold a number; a cell whose scores are verified in two ways makes two rows.
COUNTS = {
    ("TFMQ-DM", "1"): 5,
    ("TFMQ-DM", "2"): 13 * 4,
    ("TFMQ-DM", "3"): 13 - 2,
    ("TFMQ-DM", "4"): 7,
    ("TFMQ-DM", "5"): 2 + 3 + 1,
    ("TFMQ-DM", "6"): 2 + 2 + 3,
    ("TFMQ-DM", "deployment"): 3,
    ("TFMQ-DM", "cifar10"): 3 * 2 + 1 + 1 + 1,
    ("Q-Diffusion", "1"): 1 + 3 * 4 + 2,
    ("Q-Diffusion", "2 and 3"): 13 * 2,
    ("Q-Diffusion", "abstract"): 4,
    ("PTQD", "imagenet 20 steps"): 5,
    ("PTQD", "imagenet 250 steps"): 3,
    ("PTQD", "lsun"): 4 + 2 + 2,
    ("PTQD", "ablation"): 3,
    ("PTQD", "latency"): 2,
    ("TDQ", "S1"): 6,
    ("TDQ", "S2"): 4,
    ("TDQ", "S4"): 3 * 7 - 2,
    ("TDQ", "S5"): 2 * 4,
    ("TDQ", "S6"): 2 * 4,
    ("TDQ", "S7"): 4,
    ("TDQ", "1 cifar10"): 4 * 5 - 2 + 1 + 4,
    ("TDQ", "1 church"): 4 * 5 - 2 + 1,
    ("TDQ", "2"): 4,
    ("TDQ", "text"): 2,
    ("Temporal Feature Matters", "headline"): 3,
    ("QuEST", "QuEST 3"): 11 + 11,
    ("QuEST", "QuEST 11"): 5,
    ("QuEST", "QuEST imagenet"): 5,
    ("GAC", "GAC bedroom"): 5,
    ("Beyond Uniformity", "Beyond Uniformity ablation"): 5,
    (REVIEW, "review unconditional"): 1 + 1 + 9 + 2 + 3,
    (REVIEW, "review imagenet"): 1 + 1 + 9 + 2,
    (REVIEW, "review text-guided"): 3,
}


def rows_at(place: str) -> list[PublishedRow]:
    return [row for row in ROWS if "|".join((row.paper, row.table, row.model, row.bits, row.method)) == place]


def scores_at(place: str) -> dict[str, float]:
    (row,) = rows_at(place)
    return row.scores


@pytest.mark.parametrize(("place", "scores", "verified"), CELLS, ids=[place for place, _, _ in CELLS])
def test_a_cell_is_what_the_paper_prints(place: str, scores: dict[str, float], verified: str) -> None:
    (row,) = rows_at(place)
    assert (row.scores, row.deltas, row.verified) == (scores, {}, verified)


def test_every_printed_cell_is_there_once() -> None:
    found = Counter((row.paper, row.table) for row in ROWS)
    assert {key: found[key] for key in COUNTS} == COUNTS
    assert {row.table for row in ROWS if row.paper in ("TFMQ-DM", "Q-Diffusion", "PTQD", "TDQ")} == {
        table for paper, table in COUNTS if paper in ("TFMQ-DM", "Q-Diffusion", "PTQD", "TDQ")
    }


def test_scores_of_one_cell_that_were_seen_in_different_ways_stand_apart() -> None:
    rows = rows_at("TDQ|1 cifar10|ddim_cifar10|w4a8|tdq")
    assert [(row.scores, row.verified) for row in rows] == [
        ({"fid": 4.13}, "secondary_notes"),
        ({"is": 9.59}, "memory"),
    ]
    rows = rows_at("Q-Diffusion|1|ddim_cifar10|w8a8|qdiff")
    assert [(row.scores, row.verified) for row in rows] == [({"fid": 3.75}, "secondary"), ({"is": 9.48}, "memory")]


def test_marks_and_doubts_are_notes() -> None:
    (marked,) = rows_at("TFMQ-DM|2|ldm_church|w4a8|ptqd")
    (quoted,) = rows_at("TFMQ-DM|2|ldm_bedroom|w4a8|ptqd")
    assert (marked.note, quoted.note) == ("marked *", "")
    doubtful = {(row.paper, row.table, row.model, row.bits, row.method) for row in ROWS if "doubtful" in row.note}
    assert doubtful == {
        ("TDQ", "S6", "ddim_cifar10", "w3a3", "tdq"),
        ("TDQ", "S6", "ldm_church", "w4a4", "tdq"),
        ("TDQ", "1 church", "ldm_church", "w4a4", "nipq"),
        ("QuEST", "QuEST 3", "ldm_bedroom", "w4a8", "efficientdm"),
        ("BinaryDM", "BinaryDM 2", "ldm_ffhq", "w4a8", "qdiff"),
        ("MPQ-DM", "MPQ-DM imagenet", "ldm_imagenet", "w2a4", "mpq_dm"),
    }


def test_a_row_has_its_tables_protocol_and_its_own() -> None:
    (row,) = rows_at("TFMQ-DM|2|ldm_church|w4a8|ptqd")
    assert row.protocol == {"images": 50000, "sampler": "ddim", "steps": 400, "eta": 0.0}
    (row,) = rows_at("TFMQ-DM|2|ldm_church|w4a8|tfmq")
    assert row.protocol["interval_length"] * row.protocol["weight_samples"] == 25 * 16 * 256
    assert row.protocol["activation_samples"] == 400 * 256
    assert (row.reference, row.title) == ("arXiv 2311.16503, CVPR 2024", "Unconditional 256x256, LDM")


def test_a_table_of_another_paper_names_it() -> None:
    assert not {"Records", "Re-runs"} & {row.paper for row in ROWS}
    assert {row.reference for row in ROWS if row.paper == "QuEST"} == {"ICCV 2025"}
    assert {row.reference for row in ROWS if row.paper == "EDA-DM"} == {""}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            scores_at("TFMQ-DM|2|ldm_celebahq|w8a8|tfmq")["fid"],
            scores_at("TFMQ-DM|2|ldm_celebahq|w8a8|ptqd")["fid"] - 4.05,
        ),
        (2.34, scores_at("Q-Diffusion|2 and 3|ldm_bedroom|w4a8|qdiff")["fid"] - 2.98),
        (1.88, scores_at("Q-Diffusion|2 and 3|ldm_bedroom|w4a32|qdiff")["fid"] - 2.98),
        (rows_at("PTQD|imagenet 250 steps|ldm_imagenet|unstated|ptqd")[1].scores["fid"], 5.05 + 0.06),
        (rows_at("TFMQ-DM|6|ldm_bedroom|w4a8|tfmq")[1].scores["speedup"], 5.29 / 2.32),
    ],
)
def test_printed_differences_are_differences_of_printed_scores(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, abs=0.005)


def test_the_ablation_adds_up() -> None:
    base = scores_at("TFMQ-DM|1|ldm_bedroom|w4a8|brecq")
    assert scores_at("TFMQ-DM|5|ldm_bedroom|w4a8|brecq") == base
    assert scores_at("TFMQ-DM|5|ldm_bedroom|w4a8|tfmq") == scores_at("TFMQ-DM|2|ldm_bedroom|w4a8|tfmq")
    for part, fid in (("tiar", -4.52), ("fsc", -3.29)):
        change, result = rows_at(f"TFMQ-DM|5|ldm_bedroom|w4a8|{part}")
        assert change.deltas["fid"] == fid
        assert change.scores == result.deltas == {}
        assert {name: base[name] + change.deltas[name] for name in base} == pytest.approx(result.scores)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("TFMQ-DM|1|ldm_bedroom|fp32|float", "TFMQ-DM|2|ldm_bedroom|fp32|float"),
        ("TFMQ-DM|2|ldm_bedroom|w4a8|tfmq", "GAC|GAC bedroom|ldm_bedroom|w4a8|tfmq"),
        ("TFMQ-DM|2|ldm_bedroom|w4a32|tfmq", "GAC|GAC bedroom|ldm_bedroom|w4a32|tfmq"),
        ("TFMQ-DM|2|ldm_bedroom|w4a8|tfmq", "QuEST|QuEST 9|ldm_bedroom|w4a8|tfmq"),
        ("TFMQ-DM|2|ldm_bedroom|w8a8|tfmq", "QuEST|QuEST 9|ldm_bedroom|w8a8|tfmq"),
        ("TFMQ-DM|3|ldm_imagenet|w4a8|tfmq", "QuEST|QuEST 9|ldm_imagenet|w4a8|tfmq"),
        ("TFMQ-DM|3|ldm_imagenet|w8a8|tfmq", "QuEST|QuEST 9|ldm_imagenet|w8a8|tfmq"),
        ("TFMQ-DM|2|ldm_ffhq|w8a8|qdiff", "BinaryDM|BinaryDM 2|ldm_ffhq|w8a8|qdiff"),
        ("TFMQ-DM|2|ldm_ffhq|w4a32|qdiff", "BinaryDM|BinaryDM 2|ldm_ffhq|w4a32|qdiff"),
        ("TFMQ-DM|2|ldm_bedroom|w8a8|ptqd", "PTQD|lsun|ldm_bedroom|w8a8|ptqd"),
        ("TFMQ-DM|2|ldm_bedroom|w8a8|ptqd", "QuEST|QuEST 3|ldm_bedroom|w8a8|ptqd"),
        ("TFMQ-DM|2|ldm_church|w4a8|ptqd", "PTQD|lsun|ldm_church|w4a8|ptqd"),
        ("TFMQ-DM|3|ldm_imagenet|w4a8|qdiff", "PTQD|imagenet 20 steps|ldm_imagenet|w4a8|qdiff"),
        ("TFMQ-DM|3|ldm_imagenet|w8a8|ptqd", "QNCD|QNCD imagenet|ldm_imagenet|w8a8|ptqd"),
        ("TDQ|S1|ddim_cifar10|fp32|float", "TDQ|1 cifar10|ddim_cifar10|fp32|float"),
        ("TDQ|S1|ddim_cifar10|w4a4|tdq", "TDQ|1 cifar10|ddim_cifar10|w4a4|tdq"),
        ("D2-DPM|D2-DPM imagenet|ldm_imagenet|w4a8|d2_dpm_s", f"{REVIEW}|review imagenet|ldm_imagenet|w4a8|d2_dpm"),
        ("QuEST|QuEST 3|ldm_bedroom|w8a8|quest", "QuEST|QuEST bedroom|ldm_bedroom|w8a8|quest"),
    ],
)
def test_a_score_that_two_tables_print_is_the_same(one: str, other: str) -> None:
    first, second = scores_at(one), scores_at(other)
    shared = first.keys() & second.keys()
    assert shared
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}


def test_tables_of_the_four_papers_have_float_rows() -> None:
    places = {(row.paper, row.table, row.model) for row in ROWS if row.method == "float"}
    expected = {("TFMQ-DM", "2", model) for model in ("ldm_bedroom", "ldm_church", "ldm_celebahq", "ldm_ffhq")} | {
        ("TFMQ-DM", "1", "ldm_bedroom"),
        ("TFMQ-DM", "3", "ldm_imagenet"),
        ("TFMQ-DM", "4", "sd_v1_4"),
        ("TFMQ-DM", "deployment", "sd_v1_4"),
        ("TFMQ-DM", "cifar10", "ddim_cifar10"),
        ("Q-Diffusion", "1", "ddim_cifar10"),
        ("Q-Diffusion", "2 and 3", "ldm_bedroom"),
        ("Q-Diffusion", "2 and 3", "ldm_church"),
        ("PTQD", "imagenet 20 steps", "ldm_imagenet"),
        ("PTQD", "imagenet 250 steps", "ldm_imagenet"),
        ("PTQD", "lsun", "ldm_bedroom"),
        ("TDQ", "S1", "ddim_cifar10"),
        ("TDQ", "1 cifar10", "ddim_cifar10"),
        ("TDQ", "1 church", "ldm_church"),
    }
    assert {place for place in places if place[0] in ("TFMQ-DM", "Q-Diffusion", "PTQD", "TDQ")} == expected
    reviewed = {(row.paper, row.table, row.model) for row in ROWS if row.paper == REVIEW}
    assert reviewed <= places


def test_names_are_of_one_kind() -> None:
    for row in ROWS:
        assert re.fullmatch(r"fp32|w\d+a\d+|mixed|unstated", row.bits), row
        assert re.fullmatch(r"[a-z][a-z0-9_]*", row.method), row
        assert (row.bits == "fp32") == (row.method == "float"), row
        assert all(value is None or value >= 0 for value in row.scores.values()), row
    assert {row.model for row in ROWS} == {
        *("ddim_cifar10", "ldm_bedroom", "ldm_church", "ldm_celebahq", "ldm_ffhq", "ldm_imagenet", "sd_v1_4"),
        *("sd_xl", "unstated"),
    }


ROW = "{model: m, bits: w4a8, method: a, scores: {fid: 1}, verified: poster}"


def one_file(folder: Path, *rows: str, table: str = "title: T", file: str = "reference: R") -> str:
    lines = "".join(f"      - {row}\n" for row in rows)
    (folder / "one.yaml").write_text(f'paper: P\n{file}\ntables:\n  "1":\n    {table}\n    rows:\n{lines}')
    return str(folder / "one.yaml")


def test_reads_rows(tmp_path: Path) -> None:
    second = ROW.replace("fid: 1", "fid: null, sfid: 2.5").replace(
        "model: m", "model: m, note: n, protocol: {eta: 1.0}"
    )
    one_file(tmp_path, ROW, second, table="title: T\n    protocol: {eta: 0.0, steps: 4}")
    first, other = read_published(tmp_path)
    assert first == PublishedRow("P", "R", "1", "T", "m", "w4a8", "a", {"fid": 1.0}, {}, "poster", first.protocol, "")
    assert first.protocol == {"eta": 0.0, "steps": 4}
    assert (other.scores, other.note, other.protocol) == ({"fid": None, "sfid": 2.5}, "n", {"eta": 1.0, "steps": 4})


def test_a_table_takes_its_files_reference_only_with_its_paper(tmp_path: Path) -> None:
    one_file(tmp_path, ROW, table="title: T\n    reference: S")
    assert [(row.paper, row.reference) for row in read_published(tmp_path)] == [("P", "S")]
    one_file(tmp_path, ROW, table="title: T\n    paper: O")
    assert [(row.paper, row.reference) for row in read_published(tmp_path)] == [("O", "")]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("model: m", "model: m, seed: 3", "unknown seed"),
        ("model: m, ", "", "no model"),
        ("fid: 1", "fit: 1", "unknown fit"),
        ("poster", "rumour", "verified is 'rumour'"),
        ("fid: 1", "fid: good", "fid is 'good', not a number"),
        ("fid: 1", "fid: true", "fid is True, not a number"),
        ("fid: 1", "fid: .nan", "fid is nan, not a number"),
        ("fid: 1", 'fid: "1"', "fid is '1', not a number"),
        ("scores: {fid: 1}, ", "", "either scores or deltas"),
        ("scores:", "deltas: {fid: 1}, scores:", "either scores or deltas"),
        ("scores: {fid: 1}", "scores: 1", "not a mapping"),
        ("bits: w4a8", "bits: 48", "48 is not text"),
        ("{model: m", "{note: 1, model: m", "1 is not text"),
        ("{model: m", "{protocol: 3, model: m", "not a mapping"),
    ],
)
def test_refuses_a_row_and_says_which(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in ROW
    name = one_file(tmp_path, ROW, ROW.replace("method: a", "method: b").replace(old, new))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_published(tmp_path)
    assert str(error.value).startswith(f"{name}, table 1, row 2")


def test_refuses_a_row_that_stands_twice(tmp_path: Path) -> None:
    name = one_file(tmp_path, ROW, ROW.replace("fid: 1", "fid: 2"))
    with pytest.raises(ValueError, match="m w4a8 a stands at") as error:
        read_published(tmp_path)
    assert str(error.value).startswith(f"{name}, table 1, row 2")
    one_file(tmp_path, ROW, ROW.replace("model: m", "note: again, model: m"))
    assert len(read_published(tmp_path)) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"table": "name: T"}, "unknown name"),
        ({"table": "title: T\n    note: n"}, "unknown note"),
        ({"table": "title: 3"}, "3 is not text"),
        ({"file": "year: 2024"}, "unknown year"),
        ({"file": "reference: R\npaper: Q"}, "paper stands twice"),
        ({"table": "title: T\n    protocol: []"}, "not a mapping"),
        ({"file": "reference: [R"}, "one.yaml: while parsing"),
        ({"file": "? [R]\n: 1"}, "unhashable key"),
    ],
)
def test_refuses_a_file_and_says_which(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    name = one_file(tmp_path, ROW, **changes)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_published(tmp_path)
    assert str(error.value).startswith(name)


def test_refuses_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no published numbers"):
        read_published(tmp_path)
    for text, says in [("[]", "not a mapping"), ("paper: P", "no reference, tables"), ("{1: 2}", "not a mapping")]:
        (tmp_path / "one.yaml").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_published(tmp_path)
    one_file(tmp_path, table="title: T")
    with pytest.raises(ValueError, match="rows is not a list"):
        read_published(tmp_path)
