"""Schedulers of flow matching and of real timesteps against diffusers' own numbers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from goldens.comparing import EXACT, DamagedError, Group, Record, coverage, reading
from goldens.families import read_json, read_recorded
from goldens.formula import evaluate
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.loading.scheduler_config import KINDS, default_settings
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler, finite
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.network_convention import NetworkConvention, Operation, PipelineSampler
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import finite_set, trajectory

TRAJECTORY = 1e-5  # relative to the largest value of a trajectory
SCHEDULE = {"num_train_timesteps": 1000}  # of a recipe; these samplers take theirs from their own settings


def sampler_of(case: Record) -> Scheduler | SigmaScheduler:
    """Our sampler with the settings of a case and its arguments of `set_timesteps`; DamagedError for another scheduler."""
    if (kind := case["scheduler"]) not in KINDS:
        raise DamagedError(f"scheduler must be one of {', '.join(KINDS)}, got {kind!r}")
    settings, arguments = finite(case["config"], default_settings(kind)), dict(case["set_timesteps"])
    if unknown := arguments.keys() - {"num_inference_steps", "sigmas", "mu"}:
        raise DamagedError(
            f"there is no argument {min(unknown)!r} of set_timesteps, only num_inference_steps, sigmas, mu"
        )
    if "sigmas" in arguments:
        arguments.pop("num_inference_steps", None)
    made = SigmaScheduler if {"sigmas", "mu"} & arguments.keys() else Scheduler
    return made(kind, settings, **arguments)


def convention_of(words: str) -> NetworkConvention:
    """The convention that a pipeline's description states: a cast first, then the arithmetic; else none."""
    operations: list[Operation] = [("cast", "bfloat16")] if "bfloat16" in words else []
    if found := re.match(r"(1 - )?t ?/ ?(\d+)", words):
        operations.append(("divide", float(found[2])))
        if found[1]:
            operations.append(("subtract_from", 1.0))
    elif found := re.match(r"\((\d+) - t\) ?/ ?(\d+)", words):
        operations.append(("subtract_from", float(found[1])))
        operations.append(("divide", float(found[2])))
    elif found := re.match(r"t \* timestep_scale \(([\d.e+-]+)\)", words):
        operations.append(("multiply", float(found[1])))
    return NetworkConvention(tuple(operations), negated="negated" in words)


def path_of(case: Record, sampler: Scheduler | SigmaScheduler, x: Tensor) -> Tensor:
    """States before the first step and after every one, around the model of a case."""
    formula = case["model"].partition(", xi")[0]
    size = torch.tensor(1000.0 if max(map(abs, sampler.calls(SCHEDULE))) > 10 else 1.0)

    def predict(x: Tensor, t: Tensor, _conditions: Conditions) -> Tensor:
        return evaluate(formula, {"xi": x, "t": t.float().reshape(-1, *[1] * (x.dim() - 1)), "c": size})

    steps = trajectory(predict, sampler, SCHEDULE, x, [], Conditions())
    return torch.stack([x * sampler.start(SCHEDULE).sigma, *(step.x_next for step in steps)])


def lists(name: str, case: Record, recorded: Record) -> Iterator[tuple[str, list[float], Tensor]]:
    """Every list of a case: what it is, ours, and theirs."""
    sampler = sampler_of(case)
    scheduler, calls = sampler.scheduler(), sampler.calls(SCHEDULE)
    pipeline = PipelineSampler(sampler, convention_of(case["network_t"]))
    network, stored = pipeline.calls(SCHEDULE), recorded[f"{name}.network_t"]
    yield "timesteps", list(calls), recorded[f"{name}.timesteps"]
    yield "sigmas", scheduler.sigmas.double().tolist(), recorded[f"{name}.sigmas"]
    yield "network timesteps", list(network), stored
    counts = [case["calls"], case["distinct"]]
    yield "calls, distinct timesteps", [len(calls), len(finite_set(sampler, SCHEDULE))], torch.tensor(counts)
    dtype = str(scheduler.timesteps.dtype).removeprefix("torch.")
    yield "dtypes", [dtype == case["timesteps_dtype"]], torch.tensor(1)
    # what an artefact says of sampling
    written = json.dumps(Recipe(Sampling(pipeline), SCHEDULE, (1, 1, 1)).to_json())
    again = Recipe.from_json(json.loads(written)).sampling.sampler.calls(SCHEDULE)
    yield "network timesteps of an artefact", list(again), stored


def check_flow(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `flow` layout, and whether every tensor took part.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    cases, recorded = read_json(folder / "samplers.json")["cases"], read_recorded(folder / "samplers.safetensors")
    groups: dict[str, Group] = {}
    with reading(folder):
        for name, case in cases.items():
            for what, ours, golden in lists(name, case, recorded):
                groups.setdefault(what, Group(f"flow: {what}", EXACT)).compare(ours, golden)
            if "model" in case:
                what = f"trajectories, {case['scheduler']}"
                group = groups.setdefault(what, Group(f"flow: {what}", TRAJECTORY))
                group.compare(path_of(case, sampler_of(case), recorded[f"{name}.x"]), recorded[f"{name}.traj"])
    return [*groups.values(), coverage("flow: tensors read", set(recorded), recorded.read)]
