"""A folder's scheduler samples here as diffusers' own pipeline of that folder does, or is refused by the key."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.unit.sampling.folders import (
    GUIDANCE,
    STEPS,
    InTurn,
    Model,
    check_equal,
    put_scheduler,
    sample_captions,
    sample_unconditional,
    sampled,
)
from tfmq_exp.sampling.diffusers_scheduler import read_scheduler

pytestmark = pytest.mark.bad_input
V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM_SETTINGS: list[dict[str, Any]] = [
    {},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 2.0},
    {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    {"set_alpha_to_one": False},
    {"timestep_spacing": "trailing", "clip_sample": False},
    {"timestep_spacing": "linspace", "clip_sample": False},
    {"num_train_timesteps": 100, "beta_end": 0.1},
    {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "steps_offset": 3},
    {"trained_betas": [0.001 * (i + 1) for i in range(40)], "num_train_timesteps": 40},
    {"prediction_type": "sample", "clip_sample": False},
    V,
    V | ZERO_SNR,
    V | ZERO_SNR | {"clip_sample": False, "set_alpha_to_one": False},
]
DDPM_SETTINGS: list[dict[str, Any]] = [
    {},
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_small_log"},
    {"clip_sample": False, "timestep_spacing": "trailing"},
    {"clip_sample_range": 0.3, "steps_offset": 1},
    {"thresholding": True},
    V | ZERO_SNR,
    {"prediction_type": "sample", "timestep_spacing": "linspace"},
]
TEXT_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", SD),
    ("DDIMScheduler", SD | {"steps_offset": 0, "clip_sample": True}),
    ("DDIMScheduler", SD | V | ZERO_SNR | {"clip_sample": False}),
    ("PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", SD | {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("PNDMScheduler", SD | V | {"skip_prk_steps": True, "timestep_spacing": "trailing"}),
    ("PNDMScheduler", SD),
    ("UniPCMultistepScheduler", SD),
    ("UniPCMultistepScheduler", SD | V | {"use_karras_sigmas": True, "solver_order": 3}),
    ("DEISMultistepScheduler", SD | LEADING),
    ("DPMSolverMultistepScheduler", SD | LEADING),
    ("DPMSolverMultistepScheduler", SD | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", SD | {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", SD | {"thresholding": True, "euler_at_final": True}),
    ("DPMSolverSinglestepScheduler", SD | {"lower_order_final": True}),
    ("EulerDiscreteScheduler", SD | LEADING),
    ("EulerDiscreteScheduler", SD | V | ZERO_SNR),
    ("EulerDiscreteScheduler", SD | LEADING | {"final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", SD | LEADING),
    ("EulerAncestralDiscreteScheduler", SD | V | {"timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", SD | LEADING),
]


def first_step_is_nan(folder: Path, eta: float) -> bool:
    """Whether diffusers takes the root of a number below 0; with a signal-to-noise ratio of 0, the processor's rounding decides."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    x = torch.ones(1, 1, 4, 4)
    return bool(scheduler.step(x, int(scheduler.timesteps[0]), x, eta=eta).prev_sample.isnan().any())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", DDIM_SETTINGS, ids=str)
def test_ddim_as_in_its_pipeline(pixels: Model, settings: dict[str, Any], eta: float) -> None:
    put_scheduler(pixels.folder, "DDIMScheduler", settings, "DDIMPipeline")
    if eta == 1 and first_step_is_nan(pixels.folder, eta):
        with pytest.raises(
            ValueError, match=r"eta=1\.0 and .*'rescale_betas_zero_snr': True.* gives nan at timestep 999"
        ):
            read_scheduler(str(pixels.folder), STEPS, eta)
        return
    check_equal(sampled(pixels, eta), sample_unconditional(pixels.folder, "DDIMPipeline", eta))


@pytest.mark.parametrize("settings", DDPM_SETTINGS, ids=str)
def test_ddpm_as_in_its_pipeline(pixels: Model, settings: dict[str, Any]) -> None:
    put_scheduler(pixels.folder, "DDPMScheduler", settings, "DDPMPipeline")
    check_equal(sampled(pixels), sample_unconditional(pixels.folder, "DDPMPipeline", 0.0))


def test_a_pipeline_that_turns_its_scheduler_into_another(pixels: Model) -> None:
    put_scheduler(pixels.folder, "DDPMScheduler", {"clip_sample_range": 0.7}, "DDIMPipeline")
    assert read_scheduler(str(pixels.folder), STEPS).kind == "DDIMScheduler"
    check_equal(sampled(pixels), sample_unconditional(pixels.folder, "DDIMPipeline", 0.0))


@pytest.mark.parametrize("settings", [{}, {"set_alpha_to_one": True, "steps_offset": 1}], ids=str)
def test_a_pipeline_of_pndm_takes_no_other_scheduler(pixels: Model, settings: dict[str, Any]) -> None:
    put_scheduler(pixels.folder, "DDIMScheduler", settings, "PNDMPipeline")
    check_equal(sampled(pixels), sample_unconditional(pixels.folder, "PNDMPipeline", 0.0))


@pytest.mark.parametrize("described", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_the_index_of_a_pipeline_says_which_scheduler_is_loaded(
    pixels: Model, described: str, caplog: pytest.LogCaptureFixture
) -> None:
    put_scheduler(pixels.folder, described, {"beta_end": 0.01})
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DModel"]}
    (pixels.folder / "model_index.json").write_text(json.dumps(index))
    loaded = diffusers.DiffusionPipeline.from_pretrained(pixels.folder, low_cpu_mem_usage=False).scheduler
    with caplog.at_level(logging.WARNING):
        ours = read_scheduler(str(pixels.folder), STEPS)
    loaded.set_timesteps(STEPS)
    assert ours.kind == type(loaded).__name__
    assert ours.calls({}) == tuple(loaded.timesteps.tolist())
    assert all(loaded.config[key] == value for key, value in ours.settings.items())
    assert f"describes a {described}; it is sampled as a DPMSolverMultistepScheduler" in caplog.text


@pytest.mark.parametrize(("kind", "settings"), TEXT_SETTINGS, ids=str)
def test_captions_as_in_stable_diffusion(text: Model, kind: str, settings: dict[str, Any]) -> None:
    put_scheduler(text.folder, kind, settings, "StableDiffusionPipeline")
    ours = sampled(text, conditioning=InTurn(), guidance=GUIDANCE)
    check_equal(ours, sample_captions(text.folder, kind))


def test_what_the_pipeline_of_stable_diffusion_changes_is_said(text: Model, caplog: pytest.LogCaptureFixture) -> None:
    put_scheduler(text.folder, "DDIMScheduler", SD, "StableDiffusionPipeline")
    with caplog.at_level(logging.WARNING):
        settings = read_scheduler(str(text.folder), STEPS).settings
    assert (settings["steps_offset"], settings["clip_sample"]) == (1, False)
    assert "steps_offset=1" in caplog.text
    assert "clip_sample=False" in caplog.text
    own = read_scheduler(str(text.folder), STEPS, settings={"steps_offset": 2})
    assert own.settings["steps_offset"] == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "KDPM2DiscreteScheduler"}, "_class_name must be one of DDIMScheduler"),
    ({"_class_name": "os.system"}, "_class_name must be one of"),
    ({"_class_name": None}, "_class_name must be one of"),
    ({"_class_name": ["DDIMScheduler"]}, "_class_name must be one of"),
    ({"prediction_type": "flow_prediction"}, "prediction_type must be one of epsilon, sample, v_prediction"),
    ({"prediction_type": 3}, "prediction_type must be one of"),
    ({"predict_epsilon": False}, "predict_epsilon=False is what diffusers now calls prediction_type=sample"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type must be one of"),
    ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned"}, "variance_type must be one of"),
    ({"timestep_spacing": "sideways"}, "sideways is not supported"),
    ({"steps_offset": 900}, "steps_offset=900: 4 steps visit timestep 1650 of 0 .. 999"),
    ({"steps_offset": "one"}, "cannot sample 4 steps"),
    ({"clip_sample": "false"}, "clip_sample must be true or false, got 'false'"),
    ({"set_alpha_to_one": 0}, "set_alpha_to_one must be true or false, got 0"),
    ({"clip_sample_range": -1.0}, "clip_sample_range must be a number above 0, got -1.0"),
    ({"clip_sample_range": "1"}, "clip_sample_range must be a number above 0, got '1'"),
    ({"dynamic_thresholding_ratio": 7}, "dynamic_thresholding_ratio must be a number from 0 to 1, got 7"),
    ({"sample_max_value": 0}, "sample_max_value must be a number above 0, got 0"),
    ({"num_train_timesteps": 10**12}, "num_train_timesteps must be a whole number from 1 to 100000"),
    ({"num_train_timesteps": 3}, "4 sampler steps are not 1 to 3"),
    ({"num_train_timesteps": "many"}, "num_train_timesteps must be a whole number"),
    ({"beta_schedule": "straight"}, "straight"),
    ({"beta_start": float("nan")}, "beta_start must be a finite number"),
    ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}, "rescale_betas_zero_snr"),
    (
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
        "prediction_type must be one of epsilon, sample, v_prediction, got 'flow_prediction', with use_flow_sigmas=True",
    ),
    ({"_class_name": "EDMEulerScheduler", "sigma_min": 0}, "sigma_min must be a number above 0, got 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_honoured_is_refused_by_its_key(pixels: Model, changes: dict[str, Any], message: str) -> None:
    put_scheduler(pixels.folder, "DDIMScheduler", {})
    file = pixels.folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=r"scheduler_config\.json: ") as refused:
        read_scheduler(str(pixels.folder), STEPS)
    assert message in str(refused.value)


def test_settings_of_the_command_line(pixels: Model, caplog: pytest.LogCaptureFixture) -> None:
    put_scheduler(pixels.folder, "DDPMScheduler", {"clip_sample": False})
    assert read_scheduler(str(pixels.folder), STEPS, settings={"clip_sample": True}).settings["clip_sample"] is True
    with pytest.raises(ValueError, match=r"sampler\.settings\.spacing: a DDPMScheduler has no such setting"):
        read_scheduler(str(pixels.folder), STEPS, settings={"spacing": "trailing"})
    with pytest.raises(ValueError, match=r"a DDPMScheduler has no eta: it must be 0, got 1\.0"):
        read_scheduler(str(pixels.folder), STEPS, 1.0)
    file = pixels.folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"skip_prk_steps": True}))
    with caplog.at_level(logging.WARNING):
        read_scheduler(str(pixels.folder), STEPS)
    assert "a DDPMScheduler has no skip_prk_steps=True; passed over, as diffusers does" in caplog.text


def test_a_folder_without_scheduler(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sampler=folder reads scheduler/scheduler_config\.json"):
        read_scheduler(str(tmp_path), STEPS)
    (tmp_path / "snapshots/0a1b").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"it is a cache: give the folder below its snapshots/"):
        read_scheduler(str(tmp_path), STEPS)
    with pytest.raises(
        FileNotFoundError, match=r"google/ddpm does not exist \(nothing is downloaded\): sampler=folder reads"
    ):
        read_scheduler("google/ddpm", STEPS)


def test_a_model_without_folder() -> None:
    with pytest.raises(ValueError, match="reads a folder of model=diffusers, and this model is none; sampler=ddim"):
        read_scheduler(None, STEPS)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("DDIMScheduler", "steps_offset", 1.5),
    ],
)
def test_the_setting_behind_a_failure_is_named(tmp_path: Path, kind: str, key: str, value: Any) -> None:
    put_scheduler(tmp_path, kind, SD if kind == "DDIMScheduler" else SD | {key: value})
    changes = {key: value} if kind == "DDIMScheduler" else {}
    with pytest.raises(ValueError, match=f"cannot sample 4 steps .*'{key}': '?{value}"):
        read_scheduler(str(tmp_path), 4, settings=changes)
