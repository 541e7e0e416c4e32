"""The estimate: counts times costs, checked by hand; what is measured, against slow obvious counts; and against a real run."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.e2e.jobs import composed
from tfmq_exp.cli import main as app
from tfmq_exp.cli.estimate import Costs, Counts, Course, format_bytes, format_duration, reckon, show
from tfmq_exp.cli.measure import LiveTensors, Pass, Span, UnitCost, dearest_first, like_their_kind, measure_pass
from tfmq_exp.cli.progress import ProgressBars
from tfmq_exp.cli.survey import estimate
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.reconstruction.inputs import FloatInputs, QuantizedInputs
from tfmq_exp.reconstruction.module import LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp

GIB = 2**30
RECIPE = ReconstructionConfig(100, 8, Lp(), QuantizedInputs(), LearnRounding(1e-2, 0.01, Annealing(0.2, 20, 2)))
# three units that take 1, 2 and 3 seconds of a pass of 7, the first after half a second
UNITS = tuple(
    UnitCost(name, kind, "denoiser", 100, Span(start, end), fed=10, returned=20, row=0.1, fixed=0.5, row_memory=7)
    for name, kind, start, end in (("a", "residual", 0.5, 1.5), ("b", "residual", 1.5, 3.5), ("c", "layer", 4.0, 7.0))
)
COSTS = Costs(
    forward=Pass(7.0, 100, {}),
    observing=8.0,
    call=Pass(7.0, 100, {}),
    quantized_call=Pass(14.0, 150, {}),
    decoding=Pass(3.0, 50, {}),
    grids=11.0,
    network=4000,
    sample=64,
    image=12,
    process=1000,
)
COUNTS = Counts(
    calls=5,
    timesteps=5,
    halves=1,
    batch=4,
    cache=GIB,
    trajectories=16,
    collecting=True,
    grids=1,
    phases=("weights", "activations"),
    observed={"activations": 80},
    courses={"weights": Course(UNITS, RECIPE, samples=80, timesteps=5)},
    images={"float images": 10, "images": 10},
    diagnostics=2,
)


def seconds(counts: Counts, costs: Costs = COSTS) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in reckon(costs, counts).stages}


def test_every_stage_is_its_counts_times_its_costs() -> None:
    found = seconds(COUNTS)
    capturing = 80 * 7 + 80 * (
        0.5 + (1.5 - 1) + (4 - 3)
    )  # one float pass; then what lies before a unit and is not replayed
    judging = (1 + 2 + 3) * (80 + 80)
    learning = 100 * 3 * (0.5 + 8 * 0.1)
    assert found == pytest.approx(
        {
            "trajectory": 16 * 5 * 7,
            "weights": 11 + capturing + judging + learning,
            "activations": 80 * 8,
            "float images": 10 * (5 * 7 + 3),
            "images": 10 * (5 * 14 + 3),
            "diagnostics": 2 * 5 * (7 + 2 * 14),
        }
    )
    assert reckon(COSTS, COUNTS).seconds == pytest.approx(sum(found.values()))


def test_twice_the_iterations_are_twice_the_learning_and_nothing_else() -> None:
    course = COUNTS.courses["weights"]
    longer = replace(course, recipe=replace(RECIPE, iterations=200))
    assert longer.learning() == 2 * course.learning()
    assert longer.capturing(GIB, 1.0) == course.capturing(GIB, 1.0)
    assert longer.judging(1.0) == course.judging(1.0)
    one, other = seconds(COUNTS), seconds(replace(COUNTS, courses={"weights": longer}))
    assert other["weights"] - one["weights"] == pytest.approx(course.learning())
    assert {k: v for k, v in one.items() if k != "weights"} == {k: v for k, v in other.items() if k != "weights"}


def test_guidance_doubles_the_data() -> None:
    guided = replace(COUNTS, halves=2)
    assert guided.samples == 2 * COUNTS.samples
    sizes = [reckon(COSTS, counts).stages[0].disk for counts in (COUNTS, guided)]
    assert sizes == [16 * 5 * 64, 2 * 16 * 5 * 64]


def test_what_is_finished_costs_nothing() -> None:
    rest = replace(
        COUNTS, collecting=False, grids=0, phases=(), observed={}, courses={}, images={"images": 4}, diagnostics=0
    )
    assert seconds(rest) == {"images": 4 * (5 * 14 + 3)}
    assert reckon(COSTS, replace(rest, images={})).seconds == 0
    assert reckon(COSTS, replace(rest, images={})).host == COSTS.process


def test_the_cache_bounds_memory_and_the_rest_goes_to_disk() -> None:
    course = COUNTS.courses["weights"]
    wanted = 80 * (20 * 3 + 10 + 20 + 20 * 3)  # returned by all, fed and returned by one, replayed
    assert course.cached(GIB) == (wanted, 0)
    for cache in (400, 4000):
        memory, disk = course.cached(cache)
        assert memory <= cache // 2 + 3 * (cache // 4)
        assert disk > 0
    big = Course((replace(UNITS[0], returned=10**9),), RECIPE, samples=80, timesteps=5)
    assert big.cached(GIB)[0] <= 5 * GIB // 4


def test_a_small_cache_makes_more_passes() -> None:
    course = COUNTS.courses["weights"]
    replayed, not_replayed = course.capturing(GIB, 1.0), course.capturing(4 * 80 * 20 - 4, 1.0)
    # a float pass to the end of every unit, a quantized one to its beginning
    assert not_replayed == pytest.approx(80 * (1.5 + 3.5 + 7.0) + 80 * (0.5 + 1.5 + 4.0))
    assert replayed < not_replayed


def test_float_inputs_need_no_second_pass() -> None:
    course = replace(COUNTS.courses["weights"], recipe=replace(RECIPE, inputs=FloatInputs()))
    assert course.capturing(GIB, 3.0) == 80 * 7
    assert course.judging(1.0) == (1 + 2 + 3) * (80 + 80)  # fewer than are judged: all of them


def test_quantized_activations_slow_down_what_runs_them() -> None:
    course = replace(COUNTS.courses["weights"], quantizing=True)
    plain = replace(course, quantizing=False)
    assert course.seconds(GIB, 2.0) - plain.seconds(GIB, 2.0) == pytest.approx(80 * 2 + 6 * 160)
    assert replace(course, setup=2.0).seconds(GIB, 2.0) - course.seconds(GIB, 2.0) == pytest.approx(3 * 2)
    assert replace(course, rounds=3).seconds(GIB, 2.0) == 3 * course.seconds(GIB, 2.0)


def test_units_that_were_not_measured_cost_what_their_kind_costs() -> None:
    a, b, c = UNITS
    unknown = replace(b, row=None, fixed=0.0, row_memory=0, weights=300)
    done = like_their_kind([a, unknown, c])[1]
    assert done.row == pytest.approx(0.2)  # twice the pass of a
    assert done.fixed == pytest.approx(1.5)  # three times its weights
    assert done.row_memory == 7
    assert [cost.name for cost in dearest_first([a, b, c])] == ["c", "b", "a"]
    assert [cost.name for cost in dearest_first([a, replace(c, kind="residual"), b])] == ["c", "b", "a"]
    assert [cost.name for cost in dearest_first([b, a, replace(a, name="d", kind="layer")])] == ["b", "d", "a"]


def test_live_tensors_are_counted_at_their_peak() -> None:
    x = torch.randn(1000)
    with LiveTensors() as live:
        y = x * 2  # 4 kB
        z = y + 1  # 8 kB
        z.view(10, 100).add_(1)  # no memory of its own, and y's is given back next
        del y
        z = z.repeat(3)  # 4 + 12 kB
        x.mul_(2)  # not made here
    assert live.peak == 16_000
    assert live.alive == z.nbytes == 12_000


def test_a_pass_is_timed_with_its_parts() -> None:
    moment = 0.0

    class Slow(nn.Module):
        def forward(self, rows: int) -> None:
            nonlocal moment
            moment += 0.01 + 0.02 * rows

    def call(rows: int) -> None:
        nonlocal moment
        moment += 0.04 * rows
        network(rows)
        moment += 0.04 * rows

    network = nn.Sequential(Slow())
    found = measure_pass(call, 4, lambda: moment, {"0": network[0]})
    assert found.seconds == pytest.approx(0.1 + 0.01 / 4)  # with all four rows, which take less than PASS
    assert found.spans["0"] == Span(pytest.approx(0.04), pytest.approx(0.06 + 0.01 / 4))
    moment = 0.0
    assert measure_pass(call, 100, lambda: moment, {}).seconds == pytest.approx(0.1 + 0.01 / 4)


@pytest.mark.parametrize(
    ("value", "text"), [(0.24, "0.2 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (200_000, "2 d 8 h")]
)
def test_times_in_words(value: float, text: str) -> None:
    assert format_duration(value) == text


def test_bytes_in_words() -> None:
    assert (format_bytes(3_400_000), format_bytes(2_500_000_000)) == ("3 MB", "2.5 GB")


def experiment_of(folder: Path, *overrides: str) -> Experiment:
    cfg = composed(folder, "runtime=smoke", *overrides)
    return app.make_experiment(cfg, torch.device("cpu"), ProgressBars(Console(quiet=True)))


@pytest.mark.parametrize("method", ["tfmq", "qdiff", "qdrop", "ptqd", "nearest"])
def test_the_estimate_knows_what_a_run_has_still_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("tfmq_exp.cli.survey.PATIENCE", 0.2)
    stages = experiment_of(tmp_path, f"method={method}", "runtime.batch=4")
    quantizing = {"trajectory", "weights", "activations"}
    names = {*quantizing, "float images", "images", "diagnostics"} | ({"correction"} if method == "ptqd" else set())
    drawn = torch.random.get_rng_state()
    found = estimate(stages, app.GOALS)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert found is not None
    assert {stage.name for stage in found.stages} == names
    assert all(stage.seconds > 0 for stage in found.stages if (method, stage.name) != ("qdrop", "activations"))
    show(found, Console(quiet=True))
    for stage in (stages.trajectory, stages.weights, stages.activations):
        stage.entry.path.mkdir(parents=True)
        stage.entry.finish()
    assert estimate(stages, app.GOALS[:3]) is None
    shard = stages.float_images.entry.path / "images-000000.safetensors"
    shard.parent.mkdir(parents=True)
    shard.touch()
    rest = estimate(stages, app.GOALS)
    assert rest is not None
    assert {stage.name for stage in rest.stages} == names - quantizing
    shards = {stage.name: stage.disk for stage in rest.stages}
    assert (shards["float images"], shards["images"]) == (20 * 256, 24 * 256)  # a shard of 4 is there


def test_weights_alone_need_no_activations(tmp_path: Path) -> None:
    stages = experiment_of(tmp_path, "method=nearest")
    found = estimate(stages, app.GOALS[:2])
    assert found is not None
    assert [stage.name for stage in found.stages] == ["trajectory", "weights"]
    found = estimate(stages, app.GOALS[:1])
    assert found is not None
    assert [stage.name for stage in found.stages] == ["trajectory"]


@pytest.mark.slow
def test_the_estimate_is_near_what_a_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in CPU seconds, which other work on the machine hardly changes."""
    few = ("model.protocol.iterations=30", "model.protocol.images=16", "model.protocol.calibration_images=8")
    stages = experiment_of(tmp_path, *few, "model.protocol.recon_batch=8", "model.protocol.steps=8")
    monkeypatch.setattr("tfmq_exp.pipeline.pipeline.time.perf_counter", time.process_time)
    found = estimate(stages, app.GOALS[:5], time.process_time)
    assert found is not None
    _ = stages.float_images.result(), stages.simulated.images.result()
    took = sum(stages.pipeline.stage_log[stage.name]["seconds"] for stage in found.stages)
    assert 0.5 < found.seconds / took < 2
