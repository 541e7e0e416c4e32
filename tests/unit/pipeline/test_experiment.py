"""Stages of a run: keys without computing, which stages a goal needs, and what the pipeline records."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.jobs import composed
from tfmq_exp.cli.main import goals_up_to, make_experiment
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.store import Store


def experiment_of(folder: Path, *overrides: str) -> Experiment:
    return make_experiment(
        composed(folder, "debug=smoke", *overrides), torch.device("cpu"), lambda *_: nullcontext(lambda *_: None)
    )


NETWORK = ("trajectory", "weights", "activations")


@pytest.mark.parametrize(
    ("method", "goal", "names"),
    [
        ("nearest", "weights", NETWORK[:2]),
        ("lsq", "activations", ("examples", *NETWORK[1:])),
        ("tfmq", "diagnose", (*NETWORK, "rounding", "features", "accumulation", "similarity", "ranges", "sensitivity")),
        (
            *("nearest", "compare"),
            (
                *(*NETWORK, "float images", "images", "comparison"),
                *("float threads images", "float threads comparison"),
            ),
        ),
        (
            *("ptqd", "scores"),
            (
                *(*NETWORK, "correction", "float images", "images"),
                *("reference", "float scores", "scores", "diagnostics", "comparison"),
                *(f"float {kind} {stage}" for kind in ("batch", "bfloat16") for stage in ("images", "comparison")),
            ),
        ),
    ],
)
def test_a_goal_has_its_stages_whose_keys_need_no_computing(
    tmp_path: Path, method: str, goal: str, names: tuple[str, ...]
) -> None:
    floor = ["comparison.floor=[threads]"] if goal == "compare" else []
    experiment, goals = experiment_of(tmp_path, f"method={method}", f"until={goal}", *floor), goals_up_to(goal)
    stages = experiment.stages(goals)
    assert tuple(stage.name for stage in stages) == names
    assert len({stage.entry.path for stage in stages}) == len(stages)
    assert tuple(experiment.missing(goals)) == names
    assert not (tmp_path / "store").exists()


def test_other_sampled_timesteps_are_other_errors_of_the_same_network(tmp_path: Path) -> None:
    fewer = ("protocol.calibration.num_inference_steps=2", "method.surgery.outside_timesteps=nearest", "until=diagnose")

    def stages(steps: int) -> dict[str, Stage]:
        sampling = f"protocol.sampling.num_inference_steps={steps}"
        experiment = experiment_of(tmp_path, "method=tfmq", sampling, *fewer)
        return {stage.name: stage for stage in experiment.stages(goals_up_to("diagnose"))}

    four, five = stages(4), stages(5)
    same = {name for name in four if four[name].key == five[name].key}
    assert same == {"trajectory", "weights", "activations", "rounding", "sensitivity"}


@dataclass(eq=False)
class Slow(Stage):
    """Takes a while, after the stage that it reads."""

    number: int
    before: "Slow | None" = None
    stored_as = "slow"

    @property
    def name(self) -> str:
        return f"slow {self.number}"

    def inputs(self) -> Mapping[str, Any]:
        return {"number": self.number, "before": self.before and self.before.key}

    def compute(self, folder: Path) -> None:
        if self.before:
            self.before.result()
        time.sleep(0.05)


def test_seconds_of_a_stage_are_its_own_and_what_was_found_took_nothing(tmp_path: Path) -> None:
    def stages() -> tuple[Pipeline, Slow, Slow]:
        run: Any = None
        pipeline = Pipeline(Store(tmp_path), lambda *_: nullcontext(lambda *_: None), Logger())
        first = Slow(run, pipeline, 1)
        return pipeline, first, Slow(run, pipeline, 2, first)

    pipeline, first, second = stages()
    assert second.result() == second.entry.path
    assert [*pipeline.stage_log] == ["slow 1", "slow 2"]
    for record in pipeline.stage_log.values():
        assert record["computed"]
        assert record["seconds"] >= 0.05
        assert record["took"] == pytest.approx(record["seconds"], abs=0.05)

    again, first, second = stages()
    second.result()
    again.require(first)
    assert {name: record["computed"] for name, record in again.stage_log.items()} == {"slow 2": False, "slow 1": False}
    assert again.stage_log["slow 1"]["seconds"] == 0.0
    assert again.stage_log["slow 1"]["took"] == pipeline.stage_log["slow 1"]["took"]
