"""What pipelines give their networks is what they gave them when they were recorded, and what they give their real networks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from tests.helpers.pipelines import GOLDENS, INDEX, NAMES, call_of, copied, edit, recorded
from tfmq_exp.denoisers.pipelines.call_layout import equal
from tfmq_exp.denoisers.pipelines.pipeline_calls import PipelineCalls
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.pipelines.pipeline_recording import record_calls

TOLERANCE = 1e-5
# Rows and calls of guidance in diffusers' own code, and what it does with the results.
LAYOUTS: dict[str, tuple[tuple[str, ...], int, tuple[float, ...] | None, float]] = {
    "dit": (("given", "null"), 1, (4.0, -3.0), 1.0),
    "pixart": (("null", "given"), 1, (-3.5, 4.5), 1.0),
    "sd3": (("null", "given"), 1, (-3.0, 4.0), 1.0),
    "flux": (("given",), 1, (1.0,), 1.0),
    "wan": (("given", "null"), 2, (5.0, -4.0), 1.0),
    "lumina2": (("given", "null"), 2, None, -1.0),  # normalised, then with the other sign
}


@cache
def record(name: str, scheduler: Any = None) -> PipelineCalls:
    choices, settings = call_of(name)
    return record_calls(PipelineFolder(GOLDENS / name), choices, settings, scheduler=scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_conditions_are_the_recorded_ones(name: str) -> None:
    calls, golden, (choices, _) = record(name), recorded(name), call_of(name)
    order = calls.guidance.order
    names = {key.removeprefix("call.0.") for key in golden if key.startswith("call.0.")}
    names -= {calls.sample, calls.timestep, "output"}
    shared = {key for key, value in calls.constants.items() if isinstance(value, Tensor)}
    assert names == calls.given.keys() | shared
    for key in shared:
        assert equal(calls.constants[key], golden[f"call.0.{key}"])
    for key in calls.given:
        separate = calls.guidance.calls > 1
        found = [golden[f"call.{i}.{key}"] for i in range(calls.guidance.calls)]
        for i, kind in enumerate(order):
            expected = found[i] if separate else found[0].chunk(len(order))[i]
            ours = calls.given[key] if kind == "given" else calls.null[key].expand_as(expected)
            assert ours.dtype == expected.dtype
            assert ours.shape == expected.shape
            assert float((ours.double() - expected.double()).abs().max()) <= TOLERANCE
    assert calls.sample_shape == tuple(golden[f"call.0.{calls.sample}"].shape[1:])
    assert all(len(value) == len(choices) for value in calls.given.values())


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_and_scheduler_are_exactly_the_recorded_ones(name: str) -> None:
    calls, golden = record(name), recorded(name)
    expected = [golden[f"call.{i}.{calls.timestep}"] for i in range(INDEX[name]["network_calls"])]
    assert [float(t) for t in calls.timesteps] == [float(t.flatten()[0].double()) for t in expected]
    assert calls.timestep_dtype == str(expected[0].dtype).removeprefix("torch.")
    assert all(isinstance(t, float if expected[0].is_floating_point() else int) for t in calls.timesteps)
    assert [float(t) for t in calls.scheduler_timesteps] == golden["scheduler.timesteps"].tolist()
    assert list(calls.scheduler_sigmas) == golden["scheduler.sigmas"].double().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_guidance_is_that_of_the_pipeline(name: str) -> None:
    guidance = record(name).guidance
    assert (guidance.order, guidance.calls, guidance.weights, guidance.scale) == LAYOUTS[name]


def test_without_guidance_there_is_no_null_condition() -> None:
    choices, settings = call_of("sd3")
    calls = record_calls(PipelineFolder(GOLDENS / "sd3"), choices, {**settings, "guidance_scale": 1.0})
    assert calls.guidance.order == ("given",)
    assert not calls.null
    assert calls.timesteps == record("sd3").timesteps


def test_a_second_call_for_a_negative_prompt_is_found() -> None:
    """FLUX has no null condition of its own, and makes a second call if it is given one."""
    choices, settings = call_of("flux")
    changed = {**settings, "negative_prompt": "dog", "true_cfg_scale": 2.5}
    calls, alone = record_calls(PipelineFolder(GOLDENS / "flux"), choices, changed), record("flux")
    assert (calls.guidance.order, calls.guidance.calls, calls.guidance.weights) == (("given", "null"), 2, (2.5, -1.5))
    assert all(torch.equal(calls.given[key], alone.given[key]) for key in alone.given)
    as_prompt = record_calls(PipelineFolder(GOLDENS / "flux"), ["dog"], settings)
    assert torch.allclose(calls.null["pooled_projections"], as_prompt.given["pooled_projections"], atol=TOLERANCE)
    assert len(calls.timesteps) == 2 * len(alone.timesteps)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_rows_do_not_depend_on_their_companions(name: str) -> None:
    """Encoded one by one, and with a choice that comes twice."""
    choices, settings = call_of(name)
    together = record(name)
    folder = PipelineFolder(GOLDENS / name)
    alone = record_calls(folder, [choices[1], choices[0], choices[1]], settings, rows=1)
    for key, value in together.given.items():
        assert torch.allclose(alone.given[key].double(), value[[1, 0, 1]].double(), atol=TOLERANCE)
        assert torch.equal(alone.given[key][0], alone.given[key][2])


def test_each_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (choices, settings) = PipelineFolder(GOLDENS / "pixart"), call_of("pixart")
    parts = folder.text_components()
    seen: list[int] = []
    parts["text_encoder"].register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    monkeypatch.setattr(folder, "text_components", lambda *_: parts)
    record_calls(folder, [*choices, *choices], settings)
    # two images and three find the layout, the two different texts are the conditions; each time with the null text
    assert seen == [2, 2, 3, 3, 2, 2]


def test_the_record_is_of_the_scheduler_that_is_asked_for() -> None:
    def scheduler() -> Any:
        return DPMSolverMultistepScheduler(use_karras_sigmas=True)

    calls = record("pixart", scheduler=scheduler)
    other = scheduler()
    other.set_timesteps(4)
    assert list(calls.scheduler_timesteps) == other.timesteps.tolist() == list(calls.timesteps)
    assert list(calls.scheduler_sigmas) == other.sigmas.double().tolist()


def test_the_callers_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    record_calls(PipelineFolder(GOLDENS / "dit"), *call_of("dit"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "choices", "settings", "named"),
    [
        ("sd3", [], {}, "none"),
        ("sd3", ["a", 3], {}, "3"),
        ("dit", [1000], {}, "0 to 999"),
        ("dit", ["cat"], {}, "cat"),
        ("dit", [True], {}, "True"),
        ("sd3", ["a"], {"guidance": 3.0}, "guidance_scale"),
        ("sd3", ["a"], {"prompt_embeds": torch.zeros(1)}, "prompt_embeds"),
        ("sd3", ["a"], {"output_type": "pil"}, "output_type"),
        ("sd3", ["a"], {"num_images_per_prompt": 2}, "num_images_per_prompt"),
        ("sd3", ["a"], {"callback_on_step_end": print}, "callback_on_step_end"),
        ("sd3", ["a"], {"negative_prompt": ["dog", "cat"]}, "one text for all"),
        ("sd3", ["a"], {"height": 17}, "cannot be run"),
        ("sd3", ["a"], {"num_inference_steps": 0}, "cannot be run|does not run its network"),
        ("lumina2", ["a"], {"cfg_trunc_ratio": 0.5}, "some of the steps"),
        ("sd3", ["a"], {"skip_guidance_layers": [1]}, "calls of the network in step"),
    ],
)
def test_impossible_calls_are_refused(name: str, choices: list[Any], settings: dict[str, Any], named: str) -> None:
    usual = {**call_of(name)[1], "num_inference_steps": 8}
    with pytest.raises(ValueError, match=named):
        record_calls(PipelineFolder(GOLDENS / name), choices, {**usual, **settings})


@pytest.mark.bad_input
def test_timesteps_of_tokens_are_refused(tmp_path: Path) -> None:
    """Wan 2.2 gives every token a timestep."""
    folder = copied("wan", tmp_path)
    edit(folder / "model_index.json", lambda index: index.update(expand_timesteps=True))
    with pytest.raises(ValueError, match="one timestep for each token"):
        record_calls(PipelineFolder(folder), *call_of("wan"))


@pytest.mark.bad_input
def test_a_null_class_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = copied("dit", tmp_path)
    edit(folder / "transformer/config.json", lambda config: config.update(num_embeds_ada_norm=10))
    with pytest.raises(ValueError, match="null class is 1000, the network's is 10"):
        record_calls(PipelineFolder(folder), [3], {"num_inference_steps": 2, "guidance_scale": 4.0})
