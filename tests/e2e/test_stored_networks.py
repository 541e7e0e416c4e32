"""Networks whose weights stay in their files: every result of `run.py` has the bits of a run that has them in memory."""

import hashlib
from pathlib import Path

import pytest

from tests.e2e.jobs import job
from tests.e2e.test_pipelines import overrides_of

QUICK = (("pixart", "tfmq"), ("flux", "nearest"))
EVERY = (*QUICK, ("sd3", "tfmq"), ("dit", "tfmq"), ("flux", "brecq"), ("wan", "gptq"), ("sd3", "qdiff"))


def results(folder: Path) -> dict[str, str]:
    """Hashes of the stored tensors, but for those of single units."""
    files = [file for file in (folder / "store").rglob("*.safetensors") if file.parent.name != "units"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ran(name: str, method: str, weights: str, folder: Path, *further: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    given = (
        "protocol.sampling.images=2",
        "until=images",
        f"paths.store={folder / 'store'}",
        f"method={method}",
        *further,
    )
    job(
        folder,
        "model=pipeline",
        *overrides_of(name, folder),
        f"runtime.weights={weights}",
        "runtime.estimate=false",
        *given,
    )
    return results(folder)


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.every_family) for pair in EVERY],
)
def test_results_are_those_of_a_network_in_memory(name: str, method: str, tmp_path: Path) -> None:
    stored = ran(name, method, "stored", tmp_path / "stored")
    assert {file.split("/")[1] for file in stored} >= {"weights", "activations", "images"}
    assert stored == ran(name, method, "memory", tmp_path / "memory")
