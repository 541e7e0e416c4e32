"""Rows that an engine executed: told apart from the simulation beside them, in tables, charts and pictures."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.run_folders import Reader, read, row, run, table
from tfmq_exp.report.html.deployment import deployments
from tfmq_exp.report.html.grouping import group_runs
from tfmq_exp.report.html.run_charts import series, stage_rows
from tfmq_exp.report.html.run_reader import read_runs

SIMULATED = {0: 3.0, 1: 3.5, 2: 4.0}
DEPLOYED = {"one": {0: 3.1, 1: 3.7, 2: 4.3}, "two": {0: 3.2}}
RIVAL = {0: 9.0, 1: 9.1, 2: 9.2}
SITES = [
    {"site": "in", "role": "stem", "executed": "float", "weight_bits": 32, "why": "it is not quantized"},
    {"site": "a", "role": "res_conv", "executed": "int8", "weight_bits": 4, "why": ""},
    {"site": "b", "role": "res_conv", "executed": "int8", "weight_bits": 8, "why": ""},
    {"site": "c", "role": "shortcut", "executed": "float", "weight_bits": 4, "why": "its input is not quantized"},
    {"site": "d", "role": "res_conv", "executed": "float", "weight_bits": 32, "why": "it is not quantized"},
    {"site": "out", "role": "head", "executed": "int8", "weight_bits": 8, "why": ""},
    {"site": "x.attn", "role": "attention products", "executed": "float", "weight_bits": "", "why": "no engine"},
    {"site": "y.attn", "role": "attention products", "executed": "bf16", "weight_bits": "", "why": ""},
]


def with_engine(folder: Path, engine: str, seed: int, *, first: bool) -> Path:
    """A run folder whose model an engine executed too; `first` made the simulation that others find."""
    stages = {
        name: {"computed": made, "seconds": spent if made else 0.0, "took": spent}
        for name, made, spent in (("images", first, 5.0), (engine, True, 2.0), (f"{engine} images", True, 4.0))
    }
    keys = {"scores": f"simulated {seed}"}
    rows: list[dict[str, Any]] = [
        row("float", "fp32", seed, 1.0),
        row("a", "w4a8", seed, SIMULATED[seed], keys={**keys, engine: "k"}),
        row(
            "a",
            "w4a8",
            seed,
            DEPLOYED[engine][seed],
            choices={"engine": engine},
            keys={"scores": f"{engine} {seed}"},
            quantized={"mac_share_weights_and_inputs": 0.5, "layers_executed": 0.5, "engine": {"name": engine}},
        ),
    ]
    run(folder, "a", min(seed, 1))
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    (folder / "artifacts.json").write_text(json.dumps(stages))
    table(folder / "sites.csv", SITES)
    table(folder / "trajectory_error_deployed.csv", [{"t": t, "eps_error": 0.7, "x_error": 0.8} for t in (3, 1)])
    Image.new("RGB", (30, 20), "gold").save(folder / "samples_deployed.png")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds with one engine, then another engine on the first seed's simulation; and a method that is simulated alone."""
    root = tmp_path_factory.mktemp("engines")
    for seed in SIMULATED:
        with_engine(root / f"{seed}-one", "one", seed, first=True)
    with_engine(root / "3-two", "two", 0, first=False)
    for seed, fid in RIVAL.items():
        folder = run(root / f"{seed}-rival", "b", min(seed, 1))
        rows = [row("float", "fp32", seed, 1.0), row("b", "w4a8", seed, fid)]
        (folder / "results.json").write_text(json.dumps({"rows": rows}))
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> Reader:
    return read(root)


def test_the_table_has_a_line_for_every_execution(seen: Reader) -> None:
    header, *lines = seen.tables["table-1"]
    fid, layers = (next(i for i, (_, text) in enumerate(header) if text.startswith(name)) for name in ("FID", "layers"))
    found = {line[1][1]: (line[fid][1], line[layers][1]) for line in lines}

    def said(values: dict[int, float]) -> str:
        return f"{statistics.mean(values.values()):.3f} ± {statistics.stdev(values.values()):.3f}"

    assert found == {
        "float": ("1.000", "–"),
        "a": (said(SIMULATED), "–"),
        "a executed by one": (said(DEPLOYED["one"]), "0.500"),
        "a executed by two": ("3.200", "0.500"),
        "b": (said(RIVAL), "–"),
    }
    assert "Simulated quantization; rows executed by one or two in integers (50% of their layers)." in seen.text
    assert "Lines executed by one or two are computed in integers, or in what else" in seen.text
    assert "repeats a seed" not in seen.text  # both engines' runs have the simulation of seed 0


def test_an_engine_is_no_rival_of_the_simulation(seen: Reader) -> None:
    header, *lines = seen.tables["table-1"]
    fid = next(i for i, (_, text) in enumerate(header) if text.startswith("FID"))
    assert {line[1][1]: line[fid][0].strip() for line in lines if line[fid][0]} == {"a": "best"}


def test_curves_pictures_and_looks_are_each_its_own(root: Path, seen: Reader) -> None:
    (group,) = group_runs(read_runs([root]))
    variants = {variant.label: variant for variant in group.quantized}
    errors = {name: series(variant, "trajectory_error.csv", "x_error") for name, variant in variants.items()}
    assert {name: found and found.mean[-1] for name, found in errors.items()} == {
        "a": pytest.approx(0.2),
        "a (executed by one)": pytest.approx(0.8),
        "a (executed by two)": pytest.approx(0.8),
        "b": pytest.approx(0.2),
    }
    # temporal features are those of the simulation, and so are units and losses
    assert [name for name, variant in variants.items() if series(variant, "temporal_error.csv", "relative_mse")] == [
        "a",
        "b",
    ]
    drawn = [trace for name, figure in seen.figures() if name == "FID" for trace in figure["data"]]
    found = {trace["name"]: (trace["line"], trace["marker"]) for trace in drawn if trace["name"] != "float"}
    assert len({json.dumps(look) for look in found.values()}) == len(variants)
    titles = [str(a["alt"]).partition(": ")[2] for tag, a in seen.elements if tag == "img"]
    assert titles.count("digits w4a8 a (executed by one), seed 0") == 1
    sources = {str(a["alt"]).partition(": ")[2]: a["src"] for tag, a in seen.elements if tag == "img"}
    assert sources["digits w4a8 a (executed by one), seed 0"] != sources["digits w4a8 a, seed 0"]


def test_stages_are_counted_where_they_were_needed(root: Path) -> None:
    (group,) = group_runs(read_runs([root]))
    found = {(r["variant"].name, r["stage"]): (r["computed"], r["found"], r["seconds"]) for r in stage_rows(group)}
    assert found["w4a8 a", "images"] == (3, 0, 5.0)
    assert found["w4a8 a (executed by one)", "export"] == (3, 0, 2.0)
    assert found["w4a8 a (executed by two)", "images"] == (1, 0, 4.0)
    assert not [stage for _, stage in found if stage.startswith(("one", "two"))]


def test_what_is_in_integers_is_grouped_by_reason(root: Path, seen: Reader) -> None:
    found = deployments(read_runs([root]))
    assert [(one.title, len(one.runs), one.executed, one.layers) for one in found] == [
        ("digits w4a8 a (executed by one)", 3, 3, 6),
        ("digits w4a8 a (executed by two)", 1, 3, 6),
    ]
    lines = [[text for _, text in line] for line in seen.tables["integers-1"][1:]]
    assert lines == [
        ["integers", "layers a b out", "3", "4, 8", "–"],
        ["not by the engine", "stem in", "1", "32", "it is not quantized"],
        ["not by the engine", "layers c", "1", "4", "its input is not quantized"],
        ["not by the engine", "layers d", "1", "32", "it is not quantized"],
        ["bf16", "attention products y.attn", "1", "–", "–"],
        ["not by the engine", "attention products x.attn", "1", "–", "no engine"],
    ]
    assert seen.text.count("3 of 6 layers in integers") == 2 + 4  # the tables, and every run


def test_a_run_that_exports_alone_has_its_table(tmp_path: Path) -> None:
    folder = run(tmp_path / "0")
    for file in ("results.json", "temporal_error.csv", "trajectory_error.csv"):
        (folder / file).unlink()
    config = (folder / "config.yaml").read_text().replace("goal: scores", "goal: export")
    (folder / "config.yaml").write_text(f"{config}engine: {{_target_: tfmq_exp.deploy.engine.one}}\n")
    table(folder / "sites.csv", SITES)
    assert [one.title for one in deployments(read_runs([tmp_path]))] == ["digits w4a8 a (executed by one)"]
    assert "3 of 6 layers in integers" in read(tmp_path).text


def test_engines_make_no_holes_in_the_grid(tmp_path: Path) -> None:
    with_engine(tmp_path / "0", "one", 0, first=True)
    run(tmp_path / "1", "b")
    (tmp_path / "multirun.yaml").write_text(
        "hydra: {overrides: {task: ['method=a,b', 'engine=one,two']}, sweeper: null}"
    )
    assert "Nothing: every run is done, and every cell of the grid has one." in read(tmp_path).text


def test_a_damaged_table_of_sites_is_named(tmp_path: Path) -> None:
    folder = with_engine(tmp_path / "0", "one", 0, first=True)
    (folder / "sites.csv").write_text("site,role,executed,weight_bits,why\na,stem\n")
    seen = read(tmp_path)
    assert "sites.csv cannot be read: a line that ends early" in seen.text
    assert "integers-1" not in seen.tables


def test_settings_of_an_engine_stand_in_the_label(tmp_path: Path) -> None:
    choices = [
        {"engine": "one"},
        {"engine": "one", "engine.float_precision": "bf16"},
        {"method/scales": "s", "engine": "one"},
    ]
    records = [row("a", "w4a8", 0, 2.0, choices=choice) for choice in choices]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (group,) = group_runs(read_runs([tmp_path / "kept.jsonl"]))
    assert [variant.label for variant in group.variants] == [
        "a (executed by one)",
        "a (executed by one, engine.float_precision=bf16)",
        "a (scales=s, executed by one)",
    ]
