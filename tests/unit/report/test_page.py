"""The page of fabricated run folders, read back as a browser would, against numbers computed here."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_folders import EVALUATOR, FID, PROTOCOL, Reader, read, row, run
from tfmq_exp.report.html import pictures
from tfmq_exp.report.html.charts import styles
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.html.run_charts import error_curves
from tfmq_exp.report.html.run_reader import Run
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.records import ScoreRecord


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    for number, (method, seed) in enumerate(FID):
        run(root / f"{number}-{method}-seed{seed}", method, seed)
    return root


@pytest.fixture(scope="module")
def seen(sweep: Path) -> Reader:
    return read(sweep)


def test_the_table_is_mean_and_deviation_over_seeds(seen: Reader) -> None:
    header, *rows = seen.tables["table-1"]
    column = next(i for i, (_, text) in enumerate(header) if text.startswith("FID"))
    assert "digits features" in header[column][1]
    assert [line[:3] for line in rows] == [
        [("", "fp32"), ("", "float"), ("", "2")],
        [("", "w4a8"), ("", "a"), ("", "2")],
        [("", "w4a8"), ("", "b"), ("", "2")],
    ]
    wanted = {
        method: f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
        for method in "ab"
        for found in [[FID[method, 0], FID[method, 1]]]
    }
    assert [line[column][1] for line in rows] == ["1.000", wanted["a"], wanted["b"]]
    assert [line[column][0] for line in rows] == ["", "", ""]  # two seeds make nobody the best
    assert "2 of 2 lines have fewer than 3 seeds" in seen.text
    assert "24 generated images are too few for FID (64 features) and sFID (112 features)" in seen.text


def test_the_summary_says_what_was_run(seen: Reader) -> None:
    assert "4 runs: 4 done" in seen.text
    assert "Simulated quantization" in seen.text
    assert "digits features against scikit-learn digits" in seen.text
    assert "Nothing: every run is done, and every cell of the grid has one." in seen.text
    assert "None of the papers known here has numbers of digits" in seen.text


def test_curves_are_means_with_what_the_seeds_span(seen: Reader) -> None:
    figures = [f for _, f in seen.figures() if "float power" in f["layout"]["yaxis"].get("title", {}).get("text", "")]
    band, line = [trace for trace in figures[0]["data"] if trace["legendgroup"] == "a"]
    assert line["x"] == [3, 1]
    assert line["y"] == [statistics.mean([0.5, 1.5]), statistics.mean([0.25, 0.75])]
    assert band["y"] == [1.5, 0.75, 0.25, 0.5]  # the most along the steps, the least on the way back
    assert [trace["mode"] for trace in figures[0]["data"]] == ["lines"] * 2 + ["lines+markers"] * 2  # lines cover bands


def test_a_method_has_one_colour_everywhere(seen: Reader) -> None:
    colours: dict[str, set[str]] = {}
    for _, figure in seen.figures():
        for trace in figure["data"]:
            if trace.get("name") in ("a", "b"):
                colours.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert {name: len(found) for name, found in colours.items()} == {"a": 1, "b": 1}
    assert colours["a"] != colours["b"]


def test_nothing_is_loaded(seen: Reader) -> None:
    for tag, attributes in seen.elements:
        if tag in ("script", "link", "img", "iframe", "source", "object", "embed"):
            loaded = [attributes.get(name) for name in ("src", "href", "srcset", "data")]
            assert all(value is None or value.startswith("data:") for value in loaded), (tag, attributes)
    assert not re.search(r"url\(|@import", "".join(seen.styles))
    policy = next(a["content"] for t, a in seen.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert sum("plotly.js v" in text[:200] for text in seen.scripts) == 1


def test_configurations_differ_in_what_differs(seen: Reader) -> None:
    found = next(rows for rows in seen.tables.values() if rows[0][0][1] == "key")
    lines = {line[0][1]: [text for _, text in line[1:]] for line in found}
    assert lines["key"] == ["w4a8 a", "w4a8 b"]
    assert lines["seed"] == ["0, 1", "0, 1"]
    assert lines["method.iterations"] == ["5", "7"]
    assert not any("shared" in key for key in lines)
    assert seen.text.count("shared:") == 4  # in the full configuration of every run


def test_stages_are_counted_as_computed_or_found(seen: Reader) -> None:
    found = next(rows for rows in seen.tables.values() if rows[0][0][1] == "bits and method")
    assert [text for _, text in found[1]] == ["w4a8 a", "weights", "1", "1", "1.50", "2.50", "900"]


def test_samples_are_inlined(seen: Reader) -> None:
    images = [attributes for tag, attributes in seen.elements if tag == "img"]
    assert len(images) == 4
    assert all((image["src"] or "").startswith("data:image/") for image in images)


def test_models_and_evaluators_never_share_a_table_or_an_axis(tmp_path: Path) -> None:
    run(tmp_path / "0")
    run(tmp_path / "1", evaluator=EVALUATOR | {"name": "Inception"})
    run(tmp_path / "2", model="other")
    run(tmp_path / "3", protocol=PROTOCOL | {"images": 50})
    seen = read(tmp_path)
    tables = [rows for name, rows in seen.tables.items() if re.fullmatch(r"table-\d", name)]
    assert [len(rows) for rows in tables] == [3, 3, 3, 3]
    assert sum(any("Inception" in text for _, text in rows[0]) for rows in tables) == 1
    axes = [f["layout"]["yaxis"]["title"]["text"] for name, f in seen.figures() if name == "FID"]
    assert sorted(axes) == ["FID (Inception) ↓", *["FID (digits features) ↓"] * 3]


def test_settings_that_differ_make_two_lines(tmp_path: Path) -> None:
    for iterations in (5, 50):
        rows = [row("float", "fp32", 0, 1.0), row("a", "w4a8", 0, 2.0, cost={"weight_iterations": iterations})]
        (run(tmp_path / str(iterations)) / "results.json").write_text(json.dumps({"rows": rows}))
    rows = read(tmp_path).tables["table-1"]
    assert {text for line in rows[2:] for _, text in line[1:2]} == {"a weight iterations 5", "a weight iterations 50"}


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "paper": "P",
        "reference": "",
        "table": "1",
        "title": "T",
        "model": "digits",
        "bits": "w4a8",
        "deltas": {},
        "verified": "poster",
        "note": "",
    }
    protocol = {"sampler": "ddim", "steps": 4, "eta": 0.0, "images": 24, "evaluator": "digits features", "skip": "quad"}
    published = (
        PublishedRow(**shared, method="a", scores={"fid": 2.0}, protocol=protocol),
        PublishedRow(**shared, method="b", scores={"fid": 2.0}, protocol=protocol | {"images": 50000}),
        PublishedRow(**shared, method="unknown", scores={"fid": 2.0}, protocol=protocol),
    )
    run(tmp_path / "0", "a")
    run(tmp_path / "1", "b")
    seen = read(tmp_path, published=published)
    lines = {line[1][1]: [text for _, text in line] for line in seen.tables["papers-1"][1:]}
    assert lines["a"][3:7] == ["3.00", "1", "2", "+1.00"]
    assert lines["b"][6] == "–"
    assert "images 50000 in the paper, 24 here" in lines["b"][-1]
    assert "w4a8 unknown" in seen.text.partition("Published rows without a run")[2]


def test_saved_records_make_tables_without_folders(tmp_path: Path) -> None:
    records = [row("float", "fp32", 0, 1.0), row("a", "w4a8", 0, 3.0), row("a", "w4a8", 1, 5.0)]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = read(tmp_path / "kept.jsonl")
    assert "3 saved records without run folders" in seen.text
    assert f"4.000 ± {statistics.stdev([3, 5]):.3f}" in [text for _, text in seen.tables["table-1"][2]]


def test_many_pictures_are_capped_with_a_note(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURES", 2)
    seen = read(sweep)
    titles = [attributes["alt"] for tag, attributes in seen.elements if tag == "img"]
    assert len(titles) == 2
    assert [str(title).partition(": ")[2] for title in titles] == ["digits w4a8 a, seed 0", "digits w4a8 b, seed 0"]
    assert "2 further grids are left out" in seen.text


def test_seeds_that_are_far_apart_are_lines_of_their_own() -> None:
    runs = [
        Run("", Path(), "done", tables={"temporal_error.csv": ({"t": 1, "relative_mse": value},)})
        for value in (1.0, 20.0)
    ]
    variant = Variant("w4a8", "a", [ScoreRecord(**row("a", "w4a8", 0, 1.0))] * 2, runs)
    views = error_curves(Group((variant,)), styles(["a"]), "temporal")
    figure = views["w4a8"].to_plotly_json()
    assert [list(trace["y"]) for trace in figure["data"]] == [[1.0], [20.0], [10.5]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Three seeds of lines that are apart, close, alone in what they quantize, and made by one seed."""
    fids = {
        "far": (5.0, 5.1, 5.2),
        "first": (2.0, 2.1, 2.2),
        "second": (2.1, 2.15, 2.2),
        "other": (1.0, 1.0, 1.0),
        "odd": (0.1, 0.1, 6.2),
        "lonely": (0.5,),
    }
    outputs = {"mac_share_weights_and_inputs": 0.001, "mac_share_outputs": 0.999}
    records = [
        row(method, bits, seed, fid, **({"quantized": outputs} if method == "other" else {}))
        for method, found in fids.items()
        for seed, fid in enumerate(found)
        for bits in (["w4a8"] if method in ("odd", "lonely") else ["w4a8", "w3a8"])
        if (bits, method) != ("w3a8", "second")
    ]
    path = tmp_path_factory.mktemp("compared") / "kept.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read(path)


def marks(seen: Reader, bits: str) -> dict[str, str]:
    header, *rows = seen.tables["table-1"]
    fid = next(i for i, (_, text) in enumerate(header) if text.startswith("FID"))
    return {line[1][1]: line[fid][0].strip() for line in rows if line[0][1] == bits}


def test_only_what_can_be_compared_is_the_best(compared: Reader) -> None:
    assert marks(compared, "w3a8") == {"far": "", "first": "best", "other": ""}
    header = [text for _, text in compared.tables["table-1"][0]]
    assert header.index("MACs integer") < next(i for i, text in enumerate(header) if text.startswith("FID"))
    assert (
        "other with 0.000 of the weights and 0.001 of the MACs integer, 0.999 of the outputs quantized" in compared.text
    )


def test_a_single_seed_that_leads_leaves_nobody_the_best(compared: Reader) -> None:
    assert set(marks(compared, "w4a8").values()) == {""}


def test_what_one_deviation_does_not_tell_apart_is_close(tmp_path: Path) -> None:
    fids = {"far": (5.0, 5.1, 5.2), "first": (2.0, 2.1, 2.2), "second": (2.1, 2.15, 2.2), "odd": (0.1, 0.1, 7.0)}
    records = [row(method, "w4a8", seed, fid) for method, found in fids.items() for seed, fid in enumerate(found)]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert marks(read(tmp_path / "kept.jsonl"), "w4a8") == {"far": "", "first": "close", "second": "close", "odd": ""}


def test_a_mean_that_one_seed_makes_is_named_with_its_seeds(compared: Reader) -> None:
    said = (
        "FID: one seed makes the mean its own, marked † below: w4a8 odd (seed 0: 0.100, seed 1: 0.100, seed 2: 6.200)."
    )
    assert said in compared.text
    titles = [attributes.get("title") for tag, attributes in compared.elements if tag == "td"]
    assert "seed 0: 2.000, seed 1: 2.100, seed 2: 2.200" in titles
    assert sum("†" in text for line in compared.tables["table-1"] for _, text in line) == 2  # FID and the trajectory's


def test_models_without_scores_smoke_runs_and_methods_are_told(tmp_path: Path) -> None:
    made = run(tmp_path / "0")
    (made / ".hydra").mkdir()
    (made / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {runtime: smoke}}}")
    (run(tmp_path / "1", model="ldm", seed=1) / "results.json").unlink()
    run(tmp_path / "2", bits="w3a8")
    seen = read(tmp_path)
    assert "digits: quantization report" in seen.text
    assert "models without scores ldm" in seen.text
    assert "1 run was made with debug=smoke" in seen.text
    assert "1 of 2 runs were made with debug=smoke" in seen.text
    assert "digits a: 2 grids" in seen.text
    assert "runs without scores: 1 grid" in seen.text
