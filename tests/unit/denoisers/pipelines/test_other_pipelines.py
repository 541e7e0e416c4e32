"""Pipelines without goldens: what is recorded of them is what their real networks are given in a run of diffusers' own."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_pipelines import FAMILIES
from tfmq_exp.denoisers.pipelines.call_layout import flatten
from tfmq_exp.denoisers.pipelines.pipeline_calls import PipelineCalls
from tfmq_exp.denoisers.pipelines.pipeline_decoder import PipelineDecoder
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.pipelines.pipeline_recording import record_calls

TEXTS = ["a red cat", "photo of the sea"]


def run_of(pipeline: Any, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Arguments of every call of the real network, its last latents, and the images, in [-1, 1]."""
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    calls, latents = list[dict[str, Any]](), list[Tensor]()

    def before(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    step = pipeline.scheduler.step

    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents.append(result[1] if type(pipeline.scheduler).__name__ == "SCMScheduler" else result[0])
        return result

    pipeline.scheduler.step = kept
    hook = network.register_forward_pre_hook(before, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    given = {key: [value] * len(TEXTS) if key == "negative_prompt" else value for key, value in settings.items()}
    given["prompt"] = TEXTS
    images = pipeline(generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False, **given)[0]
    hook.remove()
    return calls, latents[-1], torch.from_numpy(images).movedim(-1, 1) * 2 - 1


def arguments_of(calls: PipelineCalls, number: int, sample: Any) -> dict[str, Any]:
    """Our arguments of one call, for both texts."""
    guidance = calls.guidance
    kinds = guidance.order if guidance.calls == 1 else guidance.order[number % guidance.calls :][:1]
    parts = [
        calls.given if kind == "given" else {k: v.expand(len(TEXTS), *v.shape[1:]) for k, v in calls.null.items()}
        for kind in kinds
    ]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    x = torch.stack(sample) if isinstance(sample, list) else sample
    t = torch.full((len(x),), calls.timesteps[number], dtype=getattr(torch, calls.timestep_dtype))
    return calls.arguments(x, t, rows, null=kinds == ("null",))


def leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        k: leaf
        for name, value in arguments.items()
        for k, leaf in flatten(value, name).items()
        if name != "return_dict"
    }


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_the_record_is_what_the_real_network_is_given(
    make: Callable[[], tuple[Any, dict[str, Any]]], tmp_path: Path
) -> None:
    pipeline, settings = make()
    pipeline.save_pretrained(tmp_path)
    expected, latents, images = run_of(pipeline, settings)
    folder = PipelineFolder(tmp_path)
    calls = record_calls(folder, TEXTS, settings)
    assert len(calls.timesteps) == len(expected)
    for number, call in enumerate(expected):
        ours, real = leaves(arguments_of(calls, number, call[calls.sample])), leaves(call)
        assert ours.keys() == real.keys()
        for name, value in real.items():
            if isinstance(value, Tensor):
                assert ours[name].dtype == value.dtype, name
                assert torch.allclose(ours[name].double(), value.double(), atol=1e-5, rtol=0), name
            else:
                assert ours[name] == value, name
    decoded = PipelineDecoder(folder, settings).decode(latents)
    assert float(images.std()) > 0.01
    assert torch.allclose(decoded, images, atol=1e-5)
