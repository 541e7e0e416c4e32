"""Schedulers of real timesteps, flow matching and EDM: a folder's samples as in diffusers' own pipeline, and what is stored of them."""

from typing import Any

import diffusers
import pytest

from tests.unit.sampling.folders import (
    GUIDANCE,
    STEPS,
    InTurn,
    Model,
    check_equal,
    put_scheduler,
    sample_captions,
    sampled,
)
from tfmq_exp.pipeline.store import canonical, key_of
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler, read_scheduler, replaced_settings
from tfmq_exp.sampling.guidance import Sampling

pytestmark = pytest.mark.bad_input
V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
TEXT_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    # timesteps that are no whole numbers
    ("EulerDiscreteScheduler", SD),
    ("EulerDiscreteScheduler", SD | {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", SD | V | {"use_exponential_sigmas": True, "sigma_max": 20.0}),
    ("EulerDiscreteScheduler", SD | V | {"timestep_type": "continuous", "use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", SD | {"use_karras_sigmas": True}),
    ("EDMEulerScheduler", {"sigma_max": 20.0}),
    ("EDMEulerScheduler", {"sigma_max": 20.0, "sigma_schedule": "exponential", **V}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_max": 20.0}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_max": 20.0, "algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    # networks of flow matching
    ("UniPCMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", FLOW | {"final_sigmas_type": "sigma_min", "shift_terminal": 0.1}),
    ("DEISMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", FLOW | {"thresholding": True, "solver_order": 3}),
    ("DPMSolverSinglestepScheduler", FLOW | {"lower_order_final": True}),
    ("LCMScheduler", SD),
    ("LCMScheduler", SD | V | {"original_inference_steps": 20}),
    ("CogVideoXDDIMScheduler", SD | V | ZERO_SNR),
]


@pytest.mark.parametrize(("kind", "settings"), TEXT_SETTINGS, ids=str)
def test_captions_as_in_stable_diffusion(text: Model, kind: str, settings: dict[str, Any]) -> None:
    put_scheduler(text.folder, kind, settings, "StableDiffusionPipeline")
    ours = sampled(text, conditioning=InTurn(), guidance=GUIDANCE)
    check_equal(ours, sample_captions(text.folder, kind))


def test_sigmas_and_a_shift_of_the_command_line(pixels: Model) -> None:
    settings = {"use_dynamic_shifting": True, "max_shift": 1.15}
    put_scheduler(pixels.folder, "FlowMatchEulerDiscreteScheduler", settings)
    found = read_scheduler(str(pixels.folder), STEPS, sigmas=[1.0, 0.5], mu=0.63)
    assert isinstance(found, SigmaScheduler)
    assert (found.sigmas, found.mu, found.num_inference_steps) == ((1.0, 0.5), 0.63, None)
    loaded = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(pixels.folder, subfolder="scheduler")
    loaded.set_timesteps(sigmas=[1.0, 0.5], mu=0.63)
    assert list(found.calls({})) == loaded.timesteps.double().tolist()
    assert replaced_settings(found, pixels.folder) == ""
    few = read_scheduler(str(pixels.folder), STEPS, mu=0.63)
    assert (len(few.calls({})), few.num_inference_steps) == (STEPS, STEPS)
    for wrong, message in (({}, "`mu` must be passed"), ({"mu": 0.6, "eta": 1.0}, "eta must be 0 with sigmas or mu")):
        with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{message}"):
            read_scheduler(str(pixels.folder), STEPS, **wrong)


KEYS = {
    "DDPMScheduler": ({"variance_type": "fixed_large", "clip_sample": True}, "de306874c9f6f500", (750, 500, 250, 0)),
    "EulerDiscreteScheduler": ({"timestep_spacing": "leading"}, "b3faa831485038e6", (750, 500, 250, 0)),
    "DPMSolverMultistepScheduler": ({"use_karras_sigmas": True}, "f8bf3d3c62f590b5", (999, 775, 301, 0)),
}


@pytest.mark.parametrize("kind", KEYS)
def test_whole_timesteps_keep_their_keys_in_stores(kind: str) -> None:
    """As they were before timesteps could be real: whole numbers by type, in records with the same fields."""
    settings, key, timesteps = KEYS[kind]
    noise = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    sampling = Sampling(Scheduler(kind, noise | settings, 4))
    calls = sampling.sampler.calls({})
    assert calls == timesteps
    assert {type(t) for t in calls} == {int}
    assert key_of("trajectory", {"sampling": canonical(sampling), "timesteps": canonical(calls)}) == key
