"""Tables of distances and of paired differences, from run folders: matched by seed and image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.run_folders import row
from tfmq_exp.report.html.comparison_page import chosen_pairs, difference_map, numbered
from tfmq_exp.report.image_distances import read_distances, summarize, write_distances
from tfmq_exp.report.paired_statistics import compare_pairs
from tfmq_exp.report.paired_tables import (
    distance_table,
    distances_in,
    networks_of,
    paired_rows,
    paired_table,
    read_members,
    summary_of,
)

FLOAT = [60.0, 61.0]
PSNR: dict[tuple[str, int], list[float]] = {
    ("a", 0): [30.0, 31.5, 29.0, 33.25],
    ("a", 1): [20.0, 22.0, 21.0, 25.0],
    ("b", 0): [28.0, 29.0, 27.5, 31.0],
    ("b", 1): [18.5, 20.5, 19.0, 22.0],
    ("b", 2): [1.0, 2.0, 3.0, 4.0],
}


def saved(root: Path, **changes: Any) -> Path:
    for (method, seed), values in PSNR.items():
        folder = root / f"{method}{seed}"
        folder.mkdir(parents=True)
        rows = [row("float", "fp32", seed, 1.0), row(method, "w4a8", seed, 2.0, **changes)]
        (folder / "results.json").write_text(json.dumps({"rows": rows}))
        networks = {"float, another batch": {"psnr": FLOAT}, "quantized": {"psnr": values}}
        write_distances(folder / "image_distances.csv", networks)
    return root


def test_methods_are_compared_on_the_images_that_both_have(tmp_path: Path) -> None:
    (networks,) = networks_of(list(read_members(saved(tmp_path))))
    assert [each.name for each in networks] == ["fp32 float, another batch", "w4a8 a", "w4a8 b"]
    (found,) = paired_rows(networks, "psnr")
    assert (found.network.label, found.reference.label) == ("b", "a")
    pairs = [(x, y) for seed in (0, 1) for x, y in zip(PSNR["b", seed], PSNR["a", seed], strict=True)]
    first, second = zip(*pairs, strict=True)
    assert found.found == compare_pairs(first, second, "↑")
    assert (found.found.images, found.agreeing, found.seeds, found.found.verdict) == (8, 2, 2, "worse")
    (other,) = paired_rows(networks, "psnr", against="w4a8 b")
    assert (other.network.label, other.found.verdict, other.found.mean) == ("a", "better", -found.found.mean)


def test_tables_say_what_the_rows_are(tmp_path: Path) -> None:
    (networks,) = networks_of(list(read_members(saved(tmp_path))))
    header, rows = distance_table(networks)
    assert header == ["bits", "method", "PSNR, dB ↑", "images"]
    assert rows[0] == ["fp32", "float, another batch", "60.50 (60.00, 60.50, 61.00)", "6"]
    assert rows[1][2].startswith("26.47 (")
    (line,) = paired_table(networks, "psnr")[1]
    assert line[:4] == ["w4a8", "b", "w4a8 a", "-2.03"]
    assert line[6:] == ["worse", "2 of 2 alike", "8"]
    assert json.loads(json.dumps(summary_of(networks)))["paired"]["psnr"][0]["verdict"] == "worse"
    assert distances_in(networks) == ["psnr"]
    with pytest.raises(ValueError, match=r"no images of 'c'; there are those of w4a8 a, w4a8 b"):
        paired_rows(networks, "psnr", against="c")
    with pytest.raises(ValueError, match="distance must be one of psnr, ssim"):
        paired_rows(networks, "fid")


def test_an_engine_has_its_own_images(tmp_path: Path) -> None:
    folder = saved(tmp_path) / "a0"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    rows.append(rows[1] | {"choices": {"engine": "onednn"}})
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    values = {"quantized": {"psnr": [30.0, 31.0]}, "onednn": {"psnr": [29.0, 28.0]}}
    write_distances(folder / "image_distances.csv", values)
    (networks,) = networks_of(list(read_members(folder)))
    assert {each.name: each.seeds[0]["psnr"] for each in networks} == {
        "w4a8 a": [30.0, 31.0],
        "w4a8 a (executed by onednn)": [29.0, 28.0],
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the first line is ''"),
        ("network,image,fid\n", "the first line is 'network,image,fid'"),
        ("network,image,psnr\nquantized,1,30\n", "expected image 0 of quantized, got 1"),
        ("network,image,psnr\nquantized,0,30\nquantized,0,30\n", "expected image 1 of quantized, got 0"),
        ("network,image,psnr\nquantized,0,nan\n", "nan is not finite"),
        ("network,image,psnr\nquantized,0,x\n", "could not convert"),
        (
            "network,image,psnr,ssim\nquantized,0,1,\nquantized,1,1,1\n",
            "ssim of quantized is not there for every image",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "image_distances.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_distances(path)


def test_values_come_back_as_they_were_written(tmp_path: Path) -> None:
    values = {"float, another batch": {"psnr": [40.125]}, "quantized": {"psnr": [1 / 3, 2.0], "ssim": [0.5, 1e-9]}}
    write_distances(tmp_path / "x.csv", values)
    found = read_distances(tmp_path / "x.csv")
    assert found["quantized"]["psnr"] == pytest.approx(values["quantized"]["psnr"], rel=1e-8)
    assert found == {**found, **{"float, another batch": {"psnr": [40.125]}}}
    with pytest.raises(ValueError, match="psnr of image 1 is not finite"):
        summarize({"psnr": [1.0, float("inf")]})


def test_pairs_are_the_farthest_the_middle_and_the_closest() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0]
    assert chosen_pairs(values, "↑", 2) == {"Farthest apart": [1, 3], "In the middle": [4, 2], "Closest": [6, 5]}
    assert chosen_pairs(values, "↓", 2) == {"Farthest apart": [5, 6], "In the middle": [0, 2], "Closest": [3, 1]}
    assert chosen_pairs([3.0], "↑") == {"Farthest apart": [0]}
    assert sorted(i for part in chosen_pairs([2.0, 1.0], "↑").values() for i in part) == [0, 1]


def test_a_difference_is_multiplied_by_a_whole_factor() -> None:
    exact = np.full((2, 2, 3), 100, np.uint8)
    image = exact.copy()
    image[0, 1] = (90, 105, 100)
    found, gain = difference_map(exact, image)
    assert gain == 25
    assert found[..., 0].tolist() == [[0, 250], [0, 0]]
    assert difference_map(exact, exact)[0].max() == 0


def test_columns_are_sorted_by_the_numbers_that_they_begin_with() -> None:
    found = numbered((["method", "value"], [["a", "-1.5 (0 to 1)"], ["b", "2"]]))
    assert found["header"] == [("method", False), ("value", True)]
    assert found["rows"][0] == (False, [("a", None), ("-1.5 (0 to 1)", -1.5)])
