"""Saved pipelines of diffusers: what they give their networks, their networks, and their images, compared with recorded runs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens.comparing import EXACT, DamagedError, Group, Record, coverage, reading
from goldens.families import read_json, read_recorded
from tfmq_exp.denoisers.loading.network_folder import load_network
from tfmq_exp.denoisers.pipelines.call_layout import flatten
from tfmq_exp.denoisers.pipelines.pipeline_decoder import PipelineDecoder
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.pipelines.pipeline_recording import record_calls

CONDITIONS, LATENTS, DECODED = 1e-5, 2e-5, 1e-4  # of the sums of float32; latents relative to the largest value
CHOICES = ("prompt", "class_labels")
FORM = ("output_type",)  # arguments of the call that say what it returns


class Pipeline:
    """One recorded run of a saved pipeline.

    Args:
        folder: that holds all of them.
        name: of the pipeline.
        case: its entry in the index.
    """

    def __init__(self, folder: Path, name: str, case: Mapping[str, Any]) -> None:
        self.name, self.case = name, Record(case)
        self.recorded = read_recorded(folder / f"{name}.io.safetensors")
        call = json.loads(json.dumps(self.case["call"]))  # plain: pipelines read it
        choices = next((call[key] for key in CHOICES if key in call), None)
        if not isinstance(choices, list):
            raise DamagedError(f"{name} has neither a list of prompts nor of class_labels in its call")
        self.choices: list[Any] = choices
        self.settings = {key: value for key, value in call.items() if key not in (*CHOICES, *FORM)}
        self.folder = PipelineFolder(folder / name)
        self.calls = record_calls(self.folder, self.choices, self.settings)

    def group(self, what: str, tolerance: float, *, absolute: bool = False) -> Group:
        """A group of comparisons of this pipeline."""
        return Group(f"{self.name}: {what}", tolerance, absolute=absolute)

    def arguments(self, call: int) -> dict[str, Any]:
        """The network's arguments in one call, of our record and the recorded sample."""
        calls, count = self.calls, len(self.choices)
        order, separate = calls.guidance.order, calls.guidance.calls > 1
        kinds = [order[call % len(order)]] if separate else list(order)
        rows = [calls.given if kind == "given" else repeated(calls.null, count) for kind in kinds]
        sample = self.recorded[f"call.{call}.{calls.sample}"]
        t = torch.full((len(sample),), calls.timesteps[call], dtype=getattr(torch, calls.timestep_dtype))
        joined = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
        return calls.arguments(sample, t, joined, null=separate and kinds == ["null"])


def repeated(rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """One row as often as there are images."""
    return {name: row.expand(count, *row.shape[1:]) for name, row in rows.items()}


def check_timesteps(pipeline: Pipeline) -> Iterator[Group]:
    """Timesteps of every call, and what the scheduler was set to."""
    calls, recorded = pipeline.calls, pipeline.recorded
    timesteps, scheduler = pipeline.group("network timesteps", EXACT), pipeline.group("scheduler", EXACT)
    timesteps.compare(len(calls.timesteps), pipeline.case["network_calls"])
    for i, t in enumerate(calls.timesteps):
        golden = recorded[f"call.{i}.{calls.timestep}"]
        timesteps.compare(torch.full_like(golden, t, dtype=torch.float64), golden)
    scheduler.compare(calls.scheduler_timesteps, recorded["scheduler.timesteps"])
    sigmas = recorded["scheduler.sigmas"]
    scheduler.compare(len(calls.scheduler_sigmas), len(sigmas))
    if len(sigmas):  # some schedulers have none
        scheduler.compare(calls.scheduler_sigmas, sigmas)
    yield from (timesteps, scheduler)


def check_conditions(pipeline: Pipeline) -> Iterator[Group]:
    """Tensors and constants of the calls in the first step, of which all others have the same."""
    conditions, constants = pipeline.group("conditions", CONDITIONS, absolute=True), pipeline.group("constants", EXACT)
    for call in range(pipeline.calls.guidance.calls):
        prefix = f"call.{call}."
        ours = {
            key: leaf for name, value in pipeline.arguments(call).items() for key, leaf in flatten(value, name).items()
        }
        for name in (pipeline.calls.sample, pipeline.calls.timestep):
            del ours[name]
        for name, value in ours.items():
            if isinstance(value, Tensor):
                conditions.compare(value, pipeline.recorded[prefix + name])
        plain = {prefix + name: value for name, value in ours.items() if not isinstance(value, Tensor) and value != {}}
        # the form of the result is no condition
        golden = {key: value for key, value in pipeline.case["constants"].items() if not key.endswith(".return_dict")}
        golden = {key: value for key, value in golden.items() if key.startswith(prefix)}
        constants.compare(float(plain == golden), 1.0)
        if wrong := [
            key for key in plain | golden if key not in plain or key not in golden or plain[key] != golden[key]
        ]:
            constants.note = f"{wrong[0]}: {plain.get(wrong[0])!r:.40}"
    yield from (conditions, constants)


@torch.no_grad()
def check_network(pipeline: Pipeline) -> Iterator[Group]:
    """The network with its own weights, given our conditions, in every call."""
    network, group = (
        load_network(pipeline.folder.components[pipeline.folder.denoiser_name].folder),
        pipeline.group("network", LATENTS),
    )
    for call in range(len(pipeline.calls.timesteps)):
        ours = network(**pipeline.arguments(call), return_dict=False)[0]
        group.compare(ours, pipeline.recorded[f"call.{call}.output"])
    yield group


def first_latents(sample: Tensor, scheduler: Any, timestep: Tensor) -> Tensor:
    """The latents of which a sample is the scaled form that the network takes."""
    return (
        sample / scheduler.scale_model_input(torch.ones_like(sample), timestep)
        if hasattr(scheduler, "scale_model_input")
        else sample
    )


def sampled(pipeline: Pipeline, weights: tuple[float, ...]) -> Tensor:
    """Final latents by the scheduler from the recorded outputs, with our arguments of the scheduler and weights of guidance."""
    calls, recorded, count = pipeline.calls, pipeline.recorded, len(pipeline.choices)
    scheduler = pipeline.folder.scheduler()
    scheduler.set_timesteps(**calls.set_timesteps)
    steps, parts = scheduler.timesteps, len(calls.guidance.order)
    x = first_latents(recorded[f"call.0.{calls.sample}"][:count], scheduler, steps[0])
    for i, t in enumerate(steps):
        results = [recorded[f"call.{i * calls.guidance.calls + j}.output"] for j in range(calls.guidance.calls)]
        split = torch.cat(results).view(parts, count, *results[0].shape[1:])
        mixed = torch.einsum("p,p...->...", torch.tensor(weights), split)
        if mixed.shape != x.shape:
            mixed = mixed[:, : x.shape[1]]  # without the learned variance
        x = scheduler.step(mixed, t, x, return_dict=False)[0]
    return x


def check_images(pipeline: Pipeline) -> Iterator[Group]:
    """Final latents from the recorded outputs, and their images."""
    recorded, weights = pipeline.recorded, pipeline.calls.guidance.weights
    final = recorded["final_latents"] if "final_latents" in recorded else None  # noqa: SIM401 - what is read is noted
    if weights is not None:  # of guidance without normalisation
        ours = sampled(pipeline, weights)
        if final is not None:
            group = pipeline.group("latents", LATENTS)
            group.compare(ours, final)
            yield group
        final = ours if final is None else final
    if final is None:
        raise DamagedError(f"{pipeline.name} has no final_latents")
    group = pipeline.group("decoded", DECODED, absolute=True)
    images = PipelineDecoder(pipeline.folder, pipeline.settings).decode(final)
    group.compare((images + 1) / 2, recorded["decoded"].movedim(-1, 1))
    yield group


def check_pipelines(folder: Path) -> list[Group]:
    """Every comparison of a folder of saved pipelines, and whether every tensor took part.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    index, groups = read_json(folder / "index.json"), list[Group]()
    present, read = set[str](), set[str]()
    for name in index:
        with reading(folder / name):
            pipeline = Pipeline(folder, name, index[name])
            for check in (check_timesteps, check_conditions, check_network, check_images):
                groups += check(pipeline)
        present |= {f"{name}: {key}" for key in pipeline.recorded}
        read |= {f"{name}: {key}" for key in pipeline.recorded.read}
    return [*groups, coverage("pipelines: tensors read", present, read)]
