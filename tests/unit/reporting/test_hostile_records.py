"""Files of results that are no results are refused by their name."""

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
