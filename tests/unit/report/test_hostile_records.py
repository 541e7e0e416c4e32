"""Files of results that are no results are refused by their name."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tfmq_exp.report.records import ScoreRecord, read_records

pytestmark = pytest.mark.bad_input

ROW = ScoreRecord("digits", "w4a8", "tfmq", 0, {"fid": 1.0}, {"steps": 10}, {"name": "digits"}, 100).to_json()
VALUES: list[Any] = [None, True, 3, 1.5, math.nan, "text", [], [1], {}, {"a": 1}, [[]]]


def texts() -> Iterator[str]:
    yield from ("", "{", "[" * 100_000, "9" * 5000, '{"rows": ' + "9" * 5000 + "}", "<html>", "\x00")
    for value in VALUES:
        yield json.dumps(value)
        yield json.dumps({"rows": [value]})
        if value not in ([], {}):
            yield json.dumps({"rows": value})
        for name, right in ROW.items():
            if type(value) is not type(right):
                yield json.dumps({"rows": [ROW | {name: value}]})
    for name in ("model", "quant", "method", "seed", "scores", "protocol", "evaluator", "weights_bytes"):
        yield json.dumps({"rows": [{key: value for key, value in ROW.items() if key != name}]})
    yield json.dumps({"rows": [ROW | {"novelty": 1}]})
    yield from (json.dumps({"rows": [ROW | {"schema": schema}]}) for schema in (0, 2, 99))


def test_what_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    count = 0
    for text in texts():
        path.write_text(text)
        with pytest.raises(ValueError, match=r"\S") as caught:
            read_records(tmp_path)
        assert str(caught.value).startswith(f"{path} "), text
        assert "\n" not in str(caught.value)
        count += 1
    assert count > 150
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"results\.json is not a results file"):
        read_records(tmp_path)


def test_results_are_read(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"rows": [ROW, ROW | {"method": "qdiff"}]}))
    assert [record.method for record in read_records(tmp_path)] == ["tfmq", "qdiff"]


LINES = [json.dumps(ROW | {"method": name}) for name in ("tfmq", "qdiff")]


@pytest.mark.parametrize(
    "data",
    [
        "\n".join(LINES).encode(),
        ("\n".join(LINES) + "\n\n").encode(),
        ("\r\n".join(LINES) + "\r\n").encode(),
        ("\n \n".join(LINES) + "\n").encode("utf-8-sig"),
        "\n".join(LINES).encode("utf-16"),
    ],
)
def test_lines_are_read_as_other_programs_leave_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "records.jsonl").write_bytes(data)
    assert [record.method for record in read_records(tmp_path / "records.jsonl")] == ["tfmq", "qdiff"]


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "# results", LINES[0][:-9], LINES[0] + LINES[1], "null,"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "records.jsonl").write_text("\n".join([LINES[0], "", line, LINES[1]]))
    with pytest.raises(ValueError, match=r"records\.jsonl is not a results file of this program: line 3: "):
        read_records(tmp_path / "records.jsonl")


def test_a_packed_file_of_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(gzip.compress("\n".join(LINES).encode()))
    with pytest.raises(ValueError, match="is a gzip archive: unpack it"):
        read_records(tmp_path / "records.jsonl")
