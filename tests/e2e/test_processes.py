"""One run of several processes: the same bits as by one process, and errors that say which process they come from."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from tests.e2e.jobs import composed, job
from tfmq_exp.cli.launch import together
from tfmq_exp.core.distributed import ProcessGroup

# QDrop learns weights and scales together, under random numbers: what depends on the processes would show
TINY = (
    "method=qdrop",
    "debug=smoke",
    "device=cpu",
    "runtime.threads=1",
    "runtime.microbatches=3",
    "runtime.batch_size=4",
    "protocol.reconstruction.iterations=2",
    "protocol.sampling.num_inference_steps=2",
    "protocol.sampling.images=12",
    "protocol.calibration.images=6",
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def stored(folder: Path) -> dict[str, bytes]:
    """All tensors that the run's store holds, but for the separate units."""
    store = folder / "store"
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*.safetensors"))
        if path.parent.name != "units"
    }


def rows(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    runs = {
        n: job(tmp_path / f"{n}", *TINY, f"runtime.processes={n}") for n in (1, 2)
    }  # two have unequal shares of three parts
    alone, files = rows(runs[1]), stored(tmp_path / "1")
    assert len([name for name in files if name.startswith("images/")]) == 4 * 3  # with float ones made otherwise, twice
    assert stored(tmp_path / "2") == files
    for row, wanted in zip(rows(runs[2]), alone, strict=True):
        assert row["scores"] == pytest.approx(wanted["scores"], rel=1e-6)
        assert row["errors"] == wanted["errors"]


@pytest.mark.slow
def test_processes_train_a_network_together(tmp_path: Path) -> None:
    """Unequal shares of three parts of every batch, dropout of generators, a moving average."""
    means = ("until=weights", "runtime.estimate=false", "protocol.qat.iterations=2", "protocol.qat.batch_size=4")
    for n in (1, 2):
        job(tmp_path / f"{n}", *TINY[1:], "method=lsq_tdq", *means, f"runtime.processes={n}")
    alone = stored(tmp_path / "1")
    assert [Path(name).name for name in alone] == ["trained.safetensors"]
    assert stored(tmp_path / "2") == alone


def fail(_: DictConfig, processes: ProcessGroup, __: Path) -> None:
    raise ValueError("the second half is missing")


def die(_: DictConfig, processes: ProcessGroup, __: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("share", "said"),
    [(fail, "process 1 of 2: the second half is missing"), (die, "process 1 of 2 was ended by SIGKILL")],
)
def test_a_process_that_fails_ends_the_run_with_its_reason(tmp_path: Path, share: Any, said: str) -> None:
    with (
        pytest.raises(RuntimeError, match=said),
        together(composed(tmp_path, "runtime.processes=2"), share) as processes,
    ):
        processes.barrier()


def test_no_process_is_too_few(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="processes must be at least 1, got 0"),
        together(composed(tmp_path, "runtime.processes=0"), fail),
    ):
        pass
