"""Training noise of a folder's scheduler, as other samplers take it."""

import json
from typing import Any

import pytest
import torch

from tests.unit.sampling.folders import (
    STEPS,
    Model,
    put_scheduler,
)
from tfmq_exp.denoisers.loading.scheduler_config import training_noise
from tfmq_exp.sampling.diffusers_scheduler import read_scheduler, replaced_settings
from tfmq_exp.sampling.samplers import DDIM, PLMS, DPMSolver
from tfmq_exp.sampling.trajectory import alphas_cumprod

pytestmark = pytest.mark.bad_input
V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_other_samplers_say_what_they_leave_out(pixels: Model) -> None:
    put_scheduler(pixels.folder, "DDIMScheduler", {"thresholding": True, "timestep_spacing": "trailing"})
    left = replaced_settings(DDIM(4), pixels.folder)
    for said in (
        "DDIM samples in place of the folder's DDIMScheduler",
        "thresholding=True",
        "timestep_spacing=trailing",
    ):
        assert said in left
    assert replaced_settings(read_scheduler(str(pixels.folder), STEPS), pixels.folder) == ""
    assert replaced_settings(DDIM(4), pixels.folder / "nowhere") == ""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000},
        {"trained_betas": [0.01 * (i + 1) for i in range(20)], "num_train_timesteps": 20},
    ],
    ids=str,
)
def test_training_noise_of_other_samplers(pixels: Model, settings: dict[str, Any]) -> None:
    """Alpha-bar as diffusers' own scheduler has it, in double precision."""
    put_scheduler(pixels.folder, "DDPMScheduler", settings)
    file = pixels.folder / "scheduler/scheduler_config.json"
    from diffusers import DDPMScheduler

    wanted = DDPMScheduler(**settings).alphas_cumprod.double()
    torch.testing.assert_close(alphas_cumprod(training_noise(file)), wanted, rtol=1e-4, atol=1e-9)
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key in ("_class_name", *settings)}))
    torch.testing.assert_close(alphas_cumprod(training_noise(file)), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "sampler", "message"),
    [
        (V, DDIM(4), "DDIM takes networks that predict noise; the folder's scheduler has prediction_type=v_pred"),
        ({"rescale_betas_zero_snr": True}, DDIM(4), "rescale_betas_zero_snr=True is not supported"),
        ({"rescale_betas_zero_snr": True}, PLMS(4), "rescale_betas_zero_snr=True is not supported"),
        ({"beta_schedule": "sigmoid"}, DDIM(4), "beta_schedule must be linear"),
    ],
)
def test_other_samplers_refuse_training_noise_that_they_cannot_take(
    pixels: Model, changes: dict[str, Any], sampler: Any, message: str
) -> None:
    put_scheduler(pixels.folder, "DDIMScheduler", {})
    file = pixels.folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=r".") as refused:
        sampler.start(training_noise(file))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "settings", "predicted"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "num_train_timesteps": 500}, "flow_prediction"),
        ("FlowMatchHeunDiscreteScheduler", {}, "flow_prediction"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "flow_prediction"),
        ("EDMEulerScheduler", {}, "edm"),
        ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, "edm"),
    ],
)
def test_training_without_betas_is_sampled_by_no_sampler_of_betas(
    pixels: Model, kind: str, settings: dict[str, Any], predicted: str
) -> None:
    put_scheduler(pixels.folder, kind, settings)
    noise = training_noise(pixels.folder / "scheduler/scheduler_config.json")
    assert noise == {"num_train_timesteps": settings.get("num_train_timesteps", 1000), "prediction_type": predicted}
    for sampler in (PLMS(4), DPMSolver(4)):
        with pytest.raises(ValueError, match=rf"trained without betas \(prediction_type={predicted}\)"):
            sampler.start(noise)
    with pytest.raises(
        ValueError, match=rf"DDIM takes networks that predict noise; .* prediction_type={predicted}: this"
    ):
        DDIM(4).start(noise)


def test_a_count_that_cannot_be_is_refused_without_betas(pixels: Model) -> None:
    put_scheduler(pixels.folder, "FlowMatchEulerDiscreteScheduler", {})
    file = pixels.folder / "scheduler/scheduler_config.json"
    for count in (0, "many", None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": count}))
        with pytest.raises(ValueError, match=r"scheduler_config\.json: num_train_timesteps must be|lacks 'num_train"):
            training_noise(file)


def test_dpm_solver_takes_what_a_network_predicts() -> None:
    """Its scheduler is diffusers', which knows all kinds of predictions."""
    noise = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    x = torch.ones(1, 1, 1, 1)
    plain, v = (DPMSolver(4).start(noise | more).move(0, 0.5 * x, x, ()) for more in ({}, V))
    assert not torch.equal(plain, v)


@pytest.mark.parametrize("train", [1, 100, 1000, 4000])
def test_ddpm_visits_every_training_timestep(train: int) -> None:
    assert DDIM(None, 1.0, steps_offset=0).calls({"num_train_timesteps": train}) == tuple(reversed(range(train)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": 0},
        {"num_train_timesteps": True},
        {"beta_start": "x"},
        {"beta_end": 1.5},
        {"beta_start": -1e-4},
        {"trained_betas": [0.1]},
        {"trained_betas": [float("inf")] * 1000},
        {"trained_betas": "betas"},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_noise_that_cannot_be_is_refused_by_its_key(pixels: Model, changes: dict[str, Any]) -> None:
    put_scheduler(pixels.folder, "DDIMScheduler", {})
    file = pixels.folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: {next(iter(changes))} must be"):
        training_noise(file)
