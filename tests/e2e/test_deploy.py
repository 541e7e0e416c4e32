"""The finished model executed by an engine, as a row beside the simulated one, in plans and in what engines share."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.jobs import composed, job
from tfmq_exp.cli import main as app
from tfmq_exp.cli.dry_run import expected_cost, state
from tfmq_exp.cli.outputs.run_folder import RunOutputs
from tfmq_exp.cli.outputs.score_records import engine_choices
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.cli.sweep_report import read_job
from tfmq_exp.cli.terminal import ProgressBars
from tfmq_exp.deploy.onednn import available
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.report.html.deployment import PRODUCTS, deployments
from tfmq_exp.report.html.run_reader import read_runs

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@dataclass(frozen=True)
class Made:
    """Run folders that share a store: the simulation alone, then with each engine."""

    store: Path
    alone: Path
    root: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    found = Made(root / "store", root / "alone" / "run", root)
    run(root / "alone", found.store)
    return found


@pytest.fixture(scope="module")
def openvino(made: Made) -> Path:
    pytest.importorskip("openvino", reason="openvino is not installed")
    return run(made.root / "openvino", made.store, "engine=openvino", "runtime.threads=1")


@pytest.fixture(scope="module")
def onednn(made: Made) -> Path:
    if not available():
        pytest.skip("this build of torch has no oneDNN operators for integers")
    return run(made.root / "onednn", made.store, "engine=onednn")


def hits(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifacts.json").read_text())


def computed(folder: Path) -> set[str]:
    return {name for name, hit in hits(folder).items() if hit["computed"]}


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["rows"]


def words(store: Path, *more: str) -> list[str]:
    return ["method=nearest", "debug=smoke", f"paths.store={store}", *more]


def run(folder: Path, store: Path, *more: str) -> Path:
    return job(folder, *words(store, *more))


def planned(folder: Path, store: Path, *more: str) -> Experiment:
    """The stages of a job that is only asked what it would do."""
    cfg = composed(folder, *words(store, *more))
    return app.make_experiment(cfg, app.pick_device("cpu"), ProgressBars(app.Console(quiet=True)).stage)


def test_a_row_of_its_own_with_keys_of_its_own(tmp_path: Path, made: Made, openvino: Path) -> None:
    simulated, deployed = rows(openvino)[1:]
    assert deployed["choices"] == {"engine": "openvino"}
    assert simulated["scores"] == rows(made.alone)[1]["scores"]
    assert deployed["errors"]["trajectory"] == pytest.approx(simulated["errors"]["trajectory"], rel=1)
    found = hits(openvino)
    for stage in ("images", "scores", "diagnostics"):
        assert found[stage]["key"] == hits(made.alone)[stage]["key"], "the simulation knows nothing of engines"
        assert found[f"openvino {stage}"]["key"] != found[stage]["key"]
        assert deployed["keys"][stage] == found[f"openvino {stage}"]["key"]
        assert simulated["keys"][stage] == found[stage]["key"]
    assert (Path(found["openvino"]["path"]) / "model.xml").is_file()

    again = run(tmp_path / "again", made.store, "engine=openvino", "until=export", "runtime.threads=1")
    assert not computed(again)
    assert "openvino" in hits(again)
    assert deployments(read_runs([again]))[0].title == "digits w4a8 nearest (executed by openvino)"


@pytest.mark.parametrize("given", [{"encoder_hidden_states": np.zeros((1, 2, 3))}, {"step": np.zeros(1)}])
def test_an_exported_model_takes_its_own_inputs_alone(openvino: Path, given: dict[str, Any]) -> None:
    from tfmq_exp.deploy.openvino.runtime import ExportedUNet  # which imports openvino

    network = ExportedUNet(Path(hits(openvino)["openvino"]["path"]), threads=1)
    with pytest.raises(
        ValueError, match=f"takes sample; it was given {min('sample', *given)}, {max('sample', *given)}"
    ):
        network(np.zeros((1, 1, 16, 16), dtype=np.float32), network.timesteps[0], **given)


def test_layers_and_attention_are_in_the_table_of_sites(openvino: Path) -> None:
    lines = list(csv.DictReader((openvino / "sites.csv").open()))
    layers = [line for line in lines if line["role"] != PRODUCTS]
    assert {line["role"] for line in layers if line["executed"] == "float"} == {"stem"}
    assert {line["executed"] for line in layers if line["role"] != "stem"} == {"int8"}
    assert {line["site"]: line["role"] for line in lines}.items() >= {"conv_in": "stem", "conv_out": "head"}.items()
    products = {line["site"]: line["executed"] for line in lines if line["role"] == PRODUCTS}
    told = json.loads((Path(hits(openvino)["openvino"]["path"]) / "deployed.json").read_text())["attention"]
    assert products == {row["attention"]: row["executed"] for row in told}
    assert set(products) == {line["site"].rpartition(".")[0] for line in lines if line["role"] == "attn_qkv"}
    (found,) = deployments(read_runs([openvino]))
    assert found.layers == found.executed + 1 == len(layers) > 0
    assert [(group.role, group.dtype) for group in found.groups] == [
        ("layers", "int8"),
        ("stem", "float"),
        *((PRODUCTS, executed) for executed in ("bf16", "float") if executed in products.values()),
    ]


def test_engines_share_all_but_their_own_stages(made: Made, openvino: Path, onednn: Path) -> None:
    simulated = {name: hit["key"] for name, hit in hits(made.alone).items()}
    for name, folder in {"openvino": openvino, "onednn": onednn}.items():
        own = {name, *(f"{name} {stage}" for stage in ("images", "scores", "diagnostics", "comparison"))}
        assert computed(folder) == own
        shared = {stage: hit["key"] for stage, hit in hits(folder).items() if stage not in own}
        assert shared.items() <= simulated.items()
        assert {"images", "float images", "scores"} <= shared.keys()
        assert rows(folder)[2]["choices"] == {"engine": name}
        told = read_job(folder)
        assert (told.asked, told.computed) == (len(own | shared.keys()), len(own))


@pytest.mark.parametrize(
    ("goal", "own"),
    [
        ("export", [""]),
        ("images", ["", " images"]),
        ("scores", ["", " images", " scores", " diagnostics", " comparison"]),
    ],
)
def test_a_plan_has_the_stages_of_an_engine(
    tmp_path: Path, made: Made, onednn: Path, goal: str, own: list[str]
) -> None:
    experiment = planned(tmp_path, made.store, "engine=onednn", f"until={goal}")
    found = experiment.stages(app.goals_up_to(goal))
    names = [f"onednn{stage}" for stage in own]
    assert [stage.name for stage in found[-len(own) :]] == names
    assert not [stage for stage in found[: -len(own)] if stage.name.startswith("onednn")]
    assert {state(stage) for stage in found} == {"found"}
    assert all(stage.key == hits(onednn)[stage.name]["key"] for stage in found[-len(own) :])
    assert experiment.missing(app.goals_up_to(goal)) == {}


def test_another_engine_costs_one_more_sampling(tmp_path: Path, made: Made, openvino: Path) -> None:
    experiment = planned(tmp_path, made.store, "engine=openvino", "engine.float_precision=bf16")
    plan = experiment.stages(app.goals_up_to("scores"))
    own = ["openvino", *(f"openvino {stage}" for stage in ("images", "scores", "diagnostics", "comparison"))]
    assert [stage.name for stage in plan if state(stage) == "to be made"] == own
    assert {state(stage) for stage in plan[: -len(own)]} == {"found"}
    wanted = dict(zip(own, (None, 24, None, 4, None), strict=True))
    assert experiment.missing(app.goals_up_to("scores")) == wanted
    experiment = planned(tmp_path, made.store, "engine=openvino", "seed=7")
    whole = expected_cost(experiment, app.goals_up_to("scores"))
    assert whole is not None
    seconds = {stage.name: stage.seconds for stage in whole.stages}
    assert seconds["openvino images"] == seconds["images"] > 0
    assert seconds["openvino diagnostics"] == seconds["diagnostics"] > 0
    assert "simulated network" in whole.note


def test_what_was_changed_in_an_engine_is_in_its_row(tmp_path: Path, made: Made, openvino: Path) -> None:
    planned(tmp_path, made.store, "engine=openvino", "engine.threads=1", "engine.split_int8_weights=true")
    choices = engine_choices("openvino", current_run().overrides)
    assert choices == {"engine": "openvino", "engine.split_int8_weights": "true"}


def test_an_engines_trajectory_is_a_table_of_its_own(tmp_path: Path, made: Made, onednn: Path) -> None:
    experiment = planned(tmp_path, made.store, "engine=onednn")
    RunOutputs(experiment, tmp_path, app.Console(quiet=True), app.GOALS).save_deployed()
    own = list(csv.DictReader((tmp_path / "trajectory_error_deployed.csv").open()))
    simulated = list(csv.DictReader((onednn / "trajectory_error.csv").open()))
    assert [line["t"] for line in own] == [line["t"] for line in simulated]
    assert float(own[-1]["x_error"]) == rows(onednn)[2]["errors"]["trajectory"]


def test_export_needs_an_engine(tmp_path: Path, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, made.store, "until=export")
    assert "engine=openvino, onednn or torchao" in " ".join(capsys.readouterr().out.split())
