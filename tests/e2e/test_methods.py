"""Every method runs from end to end, and what must be the same for all of them is."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.jobs import CONF, job
from tfmq_exp.surgery import serialization

# put together like others here; tests/properties has every form and every partition by itself, and test_qat.py whole runs of lsq
ALIKE = {
    *("lsq", "pact", "pact_tdq", "nipq", "nipq_tdq", "qil", "qil_tdq", "duq", "dynamic_generator"),
    *("freeze", "tdq_thin", "tfmq_qdrop", "duq_tdq", "lsq_dynamic", "ptq4dm", "tdq", "tfmq_gptq"),
}
METHODS = sorted({path.stem for path in (CONF / "method").glob("*.yaml")} - ALIKE)
LEARNS_NOTHING = {"nearest", "gptq"}
QUANTIZES_OUTPUTS = {"brecq", "qdrop"}

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["rows"]


def hits(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifacts.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_method(tmp_path: Path, store: Path, method: str) -> None:
    overrides = (f"method={method}", "debug=smoke", f"paths.store={store}")
    folder = job(tmp_path / "first", *overrides)
    float_row, row = rows(folder)
    assert float_row["method"] == "float"
    assert row["method"] == ("s4" if method == "intervals" else method)
    assert {"fid", "sfid", "is"} <= row["scores"].keys()
    assert row["protocol"] == float_row["protocol"]
    iterations = row["cost"]["weight_iterations"] + row["cost"]["activation_iterations"]
    assert (iterations == 0) == (method in LEARNS_NOTHING)
    assert row["quantized"]["weight_share"] == 1.0
    both = 0.0 if method in QUANTIZES_OUTPUTS else 1.0
    assert row["quantized"]["mac_share_weights_and_inputs"] == pytest.approx(both, abs=0.05)

    model = serialization.load(Path(hits(folder)["activations"]["path"]) / "quantized.safetensors")
    networks = any("mlp" in name for name, _ in model.named_parameters())
    assert networks == method.startswith("dynamic_generator"), "intervals that need no activation are a table by now"

    again = job(tmp_path / "second", *overrides)
    assert not [name for name, hit in hits(again).items() if hit["computed"]]
    assert rows(again)[1]["scores"] == row["scores"]
    assert rows(again)[1]["cost"]["quantization_seconds"] == row["cost"]["quantization_seconds"] > 0


def test_methods_share_data_and_float_images(tmp_path: Path) -> None:
    """In a store of their own: where weights are found, their method does not ask for a trajectory at all."""
    keys: dict[str, set[str]] = {}
    for method in ("nearest", "tfmq"):
        found = hits(job(tmp_path / method, f"method={method}", "debug=smoke", f"paths.store={tmp_path / 'store'}"))
        for stage in ("trajectory", "float images", "float scores"):
            keys.setdefault(stage, set()).add(found[stage]["key"])
    assert {stage: len(found) for stage, found in keys.items()} == {
        "trajectory": 1,
        "float images": 1,
        "float scores": 1,
    }


def test_weights_are_learned_once_for_methods_that_share_them(tmp_path: Path, store: Path) -> None:
    """Activation scales are another stage: dynamic and tdq round the same weights the same way."""
    keys: set[str] = set()
    for method in ("dynamic", "tdq"):
        found = hits(job(tmp_path / method, f"method={method}", "debug=smoke", f"paths.store={store}"))
        made_from = json.loads((Path(found["activations"]["path"]) / "inputs.json").read_text())
        keys.add(made_from["weights"])
    assert len(keys) == 1


def test_bits_are_chosen_step_by_step(tmp_path: Path, store: Path) -> None:
    folder = job(tmp_path, "method=ptqd", "quant=w4a468", "debug=smoke", "sampler.eta=1.0", f"paths.store={store}")
    lines = (folder / "noise.csv").read_text().splitlines()
    column = lines[0].split(",").index("bits")
    assert {line.split(",")[column] for line in lines[1:]} <= {"4", "6", "8"}
    assert len(lines) == 1 + 4
