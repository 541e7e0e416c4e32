"""The estimate: properties of what is measured, counts times costs, and the stages of every kind of method."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.e2e.jobs import composed
from tfmq_exp.cli import main as app
from tfmq_exp.cli.dry_run import Estimate, expected_cost, print_estimate
from tfmq_exp.cli.estimate import Cost, Costs, StageEstimate, measure
from tfmq_exp.cli.terminal import ProgressBars
from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.core.peak_memory import PeakMemory
from tfmq_exp.pipeline.experiment import Experiment


def experiment_of(folder: Path, *overrides: str) -> Experiment:
    cfg = composed(folder, "debug=smoke", *overrides)
    return app.make_experiment(cfg, torch.device("cpu"), ProgressBars(Console(quiet=True)).stage)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Costs:
    """Of the digits model, with costs that are easy to count with."""
    found = Costs(experiment_of(tmp_path_factory.mktemp("costs"), "method=ptqd", "runtime.batch_size=4").run)
    found.call, found.quantized_call, found.decoding = Cost(4.0, 100), Cost(8.0, 150), Cost(0.4, 50)
    return found


def test_peak_memory_is_that_of_tensors_alive_together() -> None:
    x = torch.randn(1000)
    with PeakMemory() as memory:
        y = x * 2  # 4 kB
        z = y + 1  # 8 kB
        z.view(10, 100).add_(1)  # no memory of its own
        del y
        z = z.repeat(3)  # 4 + 12 kB
        x.mul_(2)  # not made here
    assert memory.bytes == 16_000
    assert sum(memory.alive.values()) == z.nbytes == 12_000


@pytest.mark.parametrize(("rows", "most", "tried"), [(8, None, {1, 8}), (8, 2, {1, 2}), (1, None, {1}), (8, 1, {1})])
def test_cost_of_rows_is_measured_or_extrapolated(
    monkeypatch: pytest.MonkeyPatch, rows: int, most: int | None, tried: set[int]
) -> None:
    moment, asked = 0.0, list[int]()

    def work(count: int) -> None:
        nonlocal moment
        asked.append(count)
        moment += 0.01 + 0.02 * count

    monkeypatch.setattr("tfmq_exp.cli.estimate.now", lambda: moment)
    found = measure(work, rows, most)
    assert set(asked) == tried
    assert found.seconds == pytest.approx(rows * 0.03 if tried == {1} else 0.01 + rows * 0.02)


def test_slow_work_is_measured_on_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    moment, asked = 0.0, list[int]()

    def work(count: int) -> None:
        nonlocal moment
        asked.append(count)
        moment += 10.0 * count

    monkeypatch.setattr("tfmq_exp.cli.estimate.now", lambda: moment)
    assert measure(work, 64).seconds == pytest.approx(640)
    assert asked == [1]


def test_stages_are_counts_times_costs(costs: Costs) -> None:
    calls = len(costs.run.calls)
    seconds = {
        name: costs.stage(name, count, "openvino").seconds
        for name, count in {
            "trajectory": None,
            "correction": None,
            "float images": 10,
            "images": 10,
            "openvino images": 5,
            "openvino": None,
            "diagnostics": 2,
            "diagnosis_ranges": 7,
        }.items()
    }
    assert seconds == pytest.approx(
        {
            "trajectory": 4 * calls * 1.0,
            "correction": 4 * (calls * 1.0 + calls * 2.0),
            "float images": 10 * (calls * 1.0 + 0.1),
            "images": 10 * (calls * 2.0 + 0.1),
            "openvino images": 5 * (calls * 2.0 + 0.1),
            "openvino": 8.0,
            "diagnostics": 2 * calls * (2 * 2.0 + 1.0),
            "diagnosis_ranges": 7 * 2.0,
        }
    )
    assert costs.stage("images", 10, "").disk == 10 * 256
    assert costs.stage("images", None, "").seconds == pytest.approx(24 * (calls * 2.0 + 0.1))


def test_learning_grows_with_iterations_and_shrinks_with_finished_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Costs, "iteration", lambda *_: Cost(2.0, 9))

    def seconds(iterations: int, finished: int) -> float:
        costs = Costs(experiment_of(tmp_path, f"protocol.reconstruction.iterations={iterations}").run)
        costs.quantized_call = Cost(0.0, 0)
        return costs.learning("weights", costs.run.method.weights, 16, finished)[0]

    one = seconds(1, 0)
    assert seconds(5, 0) == pytest.approx(5 * one)
    assert 2 >= one > seconds(1, 3) > seconds(1, 10) > 0


def test_a_small_cache_costs_time_and_spills_to_disk(tmp_path: Path) -> None:
    large, small = (
        Costs(experiment_of(tmp_path, f"runtime.activation_cache_gib={size}").run).phase("weights", 0)
        for size in (4, 1e-6)
    )
    assert small.disk > large.disk
    assert small.host < large.host


@pytest.mark.parametrize("method", ["tfmq", "qdiff", "qdrop", "ptqd", "nearest", "lsq_tdq"])
def test_missing_stages_are_estimated(tmp_path: Path, method: str) -> None:
    experiment = experiment_of(tmp_path, f"method={method}", "runtime.batch_size=4")
    names = {"weights", "activations", "images", "diagnostics"}
    names |= {f"float {kind}images" for kind in ("", "batch ", "bfloat16 ")}
    names |= set() if method == "lsq_tdq" else {"trajectory"}
    names |= {"correction"} if method == "ptqd" else set()
    experiment.missing(app.GOALS)  # which reads the structure of the network
    drawn = torch.random.get_rng_state()
    found = expected_cost(experiment, app.GOALS)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert found is not None
    assert {stage.name for stage in found.stages} == names
    kept = {("qdrop", "activations"), ("lsq_tdq", "activations")}  # learned with the weights
    assert all(stage.seconds > 0 for stage in found.stages if (method, stage.name) not in kept)
    assert all(found.memory(stage) > found.process for stage in found.stages)
    assert all(not parameter.requires_grad for parameter in experiment.run.denoiser.network.parameters())


def test_finished_stages_and_images_are_not_estimated(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, "method=nearest", "runtime.batch_size=4")
    assert [*experiment.missing(app.GOALS[:2])] == ["trajectory", "weights"]
    for stage in (experiment.trajectory, experiment.weights, experiment.activations):
        stage.entry.path.mkdir(parents=True)
        stage.entry.finish()
    assert experiment.missing(app.GOALS[:3]) == {}
    assert expected_cost(experiment, app.GOALS[:3]) is None
    shard = experiment.float_images.entry.path / "images-000000.safetensors"
    shard.parent.mkdir(parents=True)
    shard.touch()
    missing = {"float images": 20, "images": 24, "diagnostics": 4}
    assert missing.items() <= experiment.missing(app.GOALS).items()


def printed(estimate: Estimate, processes: int = 1) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    print_estimate(estimate, console, processes)
    return console.export_text()


def test_what_is_printed() -> None:
    stages = [StageEstimate("weights", 90.0, 2e9, host=1e9, disk=3e6), StageEstimate("images", 30.0, 1e9)]
    text = printed(Estimate(stages, 500_000_000, note="openvino: counted as simulated"), 2)
    assert "estimate: 2 min 0 s, 3.5 GB of memory, 3 MB on disk" in text
    assert "75%" in text
    assert "openvino: counted as simulated" in text
    assert "by one process; 2 share it" in text
    on_gpu = printed(Estimate(stages, 500_000_000, accelerated=True))
    assert "2.0 GB on the GPU, 1.5 GB of memory" in on_gpu
    assert "GPU memory" in on_gpu


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = Estimate([StageEstimate("images", 1.0, 1.0)], 0)
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert "measured on a busy machine (load 99.0" in printed(estimate)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "busy" not in printed(estimate)


@pytest.mark.parametrize(
    ("value", "text"), [(0.24, "0.2 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (200_000, "2 d 8 h")]
)
def test_durations(value: float, text: str) -> None:
    assert format_duration(value) == text


def test_sizes() -> None:
    assert (format_bytes(3_400_000), format_bytes(2_500_000_000)) == ("3 MB", "2.5 GB")
