"""The GPU benchmark, run whole on the CPU with small networks, and its imports."""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
ABSENT = ("hydra", "omegaconf", "wandb", "torch_fidelity", "lmdb")
QUICK = ("--device", "cpu", "--quick")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "scripts/bench_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("gpu")
    assert script.main(["--out", str(folder), *QUICK]) == 0
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8")), (folder / "gpu.md").read_text(
        encoding="utf-8"
    )


def values(report: dict[str, Any], part: str) -> dict[str, Any]:
    (found,) = (each for each in report["parts"] if each["part"] == part)
    return {row["what"]: row["value"] for row in found["rows"]}


def test_every_part_is_measured(script: ModuleType, report: tuple[dict[str, Any], str]) -> None:
    found, table = report
    assert {part["status"] for part in found["parts"]} == {"done"}
    assert len(found["parts"]) == len(script.CHECKS) + 7 * len(script.MODELS)
    order = [part["part"].partition(": ") for part in found["parts"]]
    assert [model for model, _, name in order if name == "full recipe"] == list(script.MODELS)
    assert order.index(("sd_v1_4", ": ", "full recipe")) < order.index(("ldm_bedroom", ": ", "GPTQ"))
    rows = [row for part in found["parts"] for row in part["rows"]]
    assert all(row["what"] in table for row in rows)
    assert all(row["value"] > 0 for row in rows if row["unit"] in ("s", "h", "GiB"))
    assert found["machine"]["torch"] == torch.__version__


def test_the_estimate_is_the_sum_of_its_parts_beside_the_papers_hours(report: tuple[dict[str, Any], str]) -> None:
    found, table = report
    hours = values(found, "ldm_bedroom: full recipe")
    total = hours.pop("estimate: full recipe")
    assert hours.pop("the paper's figure") == 2.32
    assert "arXiv 2311.16503" in table
    parts = [value for name, value in hours.items() if name.startswith("estimate: ")]
    assert total == pytest.approx(sum(parts))
    iteration = values(found, "ldm_bedroom: iterations")["iteration, sum over all units"]
    assert hours["estimate: iterations"] == pytest.approx(20_000 * iteration / 3600)
    assert "the paper's figure" not in values(found, "sd_v1_4: full recipe")


def test_the_cpu_equals_itself(report: tuple[dict[str, Any], str]) -> None:
    parts = [part for part in report[0]["parts"] if part["part"].startswith("equality: ")]
    checks = [row for part in parts for row in part["rows"] if row["what"] != "peak memory"]
    assert len(checks) == 9
    assert all(row["value"] == 0 and row["note"].endswith(": ok") for row in checks)


def test_another_network_on_the_device_is_noticed(script: ModuleType) -> None:
    wrong = script.Digits(torch.device("cpu"))
    wrong.network.conv_in.weight.mul_(1.1)
    for quantizer in wrong.models[1].weight_quantizers():
        quantizer.scale.mul_(1.01)
    changed = [*wrong.float_outputs(), *wrong.weight_ranges(), *wrong.learning()[:1]]
    assert not any(check.passed for check in changed)
    assert "MISSED" in changed[0].row().note


def test_parts_without_time_are_listed_as_skipped_and_failures_as_failed(script: ModuleType) -> None:
    def fail() -> Any:
        raise RuntimeError("no kernel")

    device, late = torch.device("cpu"), script.Clock(0)
    part = script.Part("slow", 60, lambda: [script.Row("x", 1.0)])
    skipped = script.run_part(part, late, device, patient=False)
    assert (skipped["status"].split(":")[0], skipped["rows"]) == ("skipped", [])
    assert script.run_part(part, script.Clock(2), device, patient=False)["rows"][0]["value"] == 1.0
    failed = script.run_part(part._replace(work=fail), late, device, patient=True)
    assert failed["status"] == "failed: RuntimeError: no kernel"
    table = script.markdown({"machine": {}, "parts": [skipped, failed]})
    assert "**skipped" in table
    assert "no kernel" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent_is_named(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path)])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_it_needs_no_package_that_a_gpu_machine_may_lack() -> None:
    """Imported where these packages seem not to be installed; the torchao engine too."""
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class Finder:  # of everything else
            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in {ABSENT!r} else PathFinder.find_spec(name, path, target)

            def find_distributions(self, context):
                found = PathFinder.find_distributions(context)
                return (each for each in found if each.name.replace("-", "_") not in {ABSENT!r})

        sys.meta_path = [Finder() if finder is PathFinder else finder for finder in sys.meta_path]
        sys.path.insert(0, "scripts")
        import bench_gpu
        import tfmq_exp.deploy.torchao.engine
        print([name for name in {ABSENT!r} if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
