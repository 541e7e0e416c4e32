"""The reader of published tables: what it refuses, and how tables are found."""

import re
from pathlib import Path

import pytest

from tfmq_exp.report.published_tables import PublishedRow, find_table, read_published

PUBLISHED = read_published()
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
    with pytest.raises(ValueError, match="m w4a8 a is at") as error:
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
        ({"file": "reference: R\npaper: Q"}, "paper is repeated"),
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
    with pytest.raises(ValueError, match="rows None is not a list"):
        read_published(tmp_path)


def test_papers_and_tables_are_found_by_name_and_errors_name_what_there_is() -> None:
    assert {r.model for r in find_table(PUBLISHED, "tfmq", "2")} == {
        *("ldm_bedroom", "ldm_church", "ldm_celebahq", "ldm_ffhq")
    }
    assert find_table(PUBLISHED, "q_diffusion", "2 AND 3") == find_table(PUBLISHED, "Q-Diffusion", "2 and 3")
    with pytest.raises(ValueError, match="no table '9'; there are 1, 2, 3, 4, 5, 6, deployment, cifar10"):
        find_table(PUBLISHED, "TFMQ-DM", "9")
    with pytest.raises(ValueError, match=r"no paper 'nothing'; there are .*PTQD.*TDQ, TFMQ-DM"):
        find_table(PUBLISHED, "nothing", "1")
    with pytest.raises(ValueError, match="could be D2-DPM or DMQ"):
        find_table([r for r in PUBLISHED if r.paper in ("D2-DPM", "DMQ")], "d", "1")
