"""The script that samples with an exported model and nothing of this project."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tests.e2e.jobs import CONF
from tests.e2e.test_deploy import hits, made, openvino  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def test_a_script_samples_with_the_exported_model_and_nothing_of_ours(tmp_path: Path, openvino: Path) -> None:
    """Against diffusers' sampler around the same model."""
    from tfmq_exp.deploy.openvino.runtime import ExportedUNet  # which imports openvino

    exported = Path(hits(openvino)["openvino"]["path"])
    for path in ("tfmq_exp/deploy/openvino/runtime.py", "examples/sample_deployed.py"):
        shutil.copy(CONF.parent / path, tmp_path)
    words = ["sample_deployed.py", str(exported), "images.npy", "--count", "2", "--seed", "5"]
    code = (
        f"import runpy, sys; sys.argv = {words!r}; sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print([name for name in sys.modules if name.partition('.')[0] in ('tfmq_exp', 'torch', 'diffusers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

    network = ExportedUNet(exported, batch=2, threads=1)
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(len(network.timesteps))
    assert scheduler.timesteps.tolist() == list(network.timesteps)
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 1, 16, 16), dtype=np.float32))
    for t in network.timesteps:
        noise = torch.from_numpy(network(x.numpy(), t).copy())
        x = scheduler.step(noise, t, x).prev_sample
    images = np.load(tmp_path / "images.npy")
    assert images.shape == (2, 1, 16, 16)
    # a code may fall on the other side of a tie in two roundings of the same numbers
    assert np.square(images - x.clamp(-1, 1).numpy()).mean() < 1e-3 * np.square(images).mean()


def script() -> dict[str, Any]:
    """Names of the sampling script, which finds the runtime where it would be copied to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CONF.parent / "tfmq_exp/deploy/openvino"))
        return runpy.run_path(str(CONF.parent / "examples/sample_deployed.py"))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_the_script_has_the_run_s_noise_schedule(betas: str, set_alpha_to_one: bool) -> None:
    schedule = {"num_train_timesteps": 50, "beta_schedule": betas, "beta_start": 1e-3, "beta_end": 0.03}
    table, last = script()["alphas_of"](
        {"sampler": "DDIM", "settings": {"eta": 0.0, "set_alpha_to_one": set_alpha_to_one}, "schedule": schedule}
    )
    scheduler = DDIMScheduler(**schedule, set_alpha_to_one=set_alpha_to_one)
    assert table == pytest.approx(scheduler.alphas_cumprod.numpy(), rel=1e-5)
    assert last == pytest.approx(float(scheduler.final_alpha_cumprod), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "PLMS"},
        {"settings": {"eta": 0.5}},
        {"schedule": {"beta_schedule": "squaredcos_cap_v2"}},
        {"schedule": {"prediction_type": "v_prediction"}},
        {"schedule": {"trained_betas": [0.1]}},
    ],
)
def test_the_script_refuses_another_way_of_sampling(openvino: Path, changes: dict[str, Any]) -> None:
    sampling = json.loads((Path(hits(openvino)["openvino"]["path"]) / "deployed.json").read_text())["sampling"]
    script()["alphas_of"](sampling)
    wrong = {
        name: value | changes.get(name, {}) if isinstance(value, dict) else value for name, value in sampling.items()
    }
    wrong["sampler"] = changes.get("sampler", sampling["sampler"])
    for refused in (wrong, None):
        with pytest.raises(ValueError, match="this script samples by DDIM"):
            script()["alphas_of"](refused)
