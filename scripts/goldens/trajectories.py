"""Samplers against the originals': around formulas, and around the converted networks."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from goldens.comparing import EXACT, DamagedError, Group, Record
from goldens.families import SCHEDULE, Family, read_json, read_recorded
from goldens.formula import evaluate
from goldens.networks import schedule_group
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.originals import compvis_checkpoint
from tfmq_exp.sampling import ancestral
from tfmq_exp.sampling import samplers as sampler_classes
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM, PLMS
from tfmq_exp.sampling.trajectory import Predict, Sampler, Spacing, trajectory

PRECISIONS = {"traj": (torch.float32, 2e-6), "traj_f64": (torch.float64, 1e-12)}  # relative
GROWTH, START = 5e-6, 1e-4  # of a trajectory around a network: relative to its largest value, and beside that
SPACINGS: dict[str, Spacing] = {"uniform": "uniform", "quad": "quadratic"}
DDIM_PROGRAM = ("ddim_generalized", "generalized_steps")
LDM: Mapping[str, Any] = compvis_checkpoint.training_schedule({"model": {"params": {}}})


def sampler_of(program: str, steps: int, eta: float, spacing: str) -> DDIM | PLMS:
    """Our sampler that does what an original's does.

    Raises:
        DamagedError: a sampler, spacing or eta that there is none for.
    """
    if spacing not in SPACINGS:
        raise DamagedError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if program in DDIM_PROGRAM:
        return DDIM(steps, eta, SPACINGS[spacing], steps_offset=0, set_alpha_to_one=True)
    kind = program.removeprefix("ldm_")
    if kind == "ddim":
        return DDIM(steps, eta, SPACINGS[spacing])
    if kind == "plms" and not eta and spacing == "uniform":
        return PLMS(steps)
    raise DamagedError(f"there is no sampler {program!r} with eta={eta} and {spacing} spacing")


def steps_of(sampler: DDIM | PLMS, schedule: Mapping[str, Any]) -> list[int]:
    """The timestep of every step: of every call, but for the look-ahead of PLMS."""
    calls = list(sampler.calls(schedule))
    return [*calls[:1], *calls[2:]] if isinstance(sampler, PLMS) else calls


def follow(
    predict: Predict,
    sampler: Sampler,
    schedule: Mapping[str, Any],
    x: Tensor,
    noise: Iterable[Tensor],
    conditions: Conditions,
) -> Tensor:
    """States before the first step and after every one, with the recorded noise instead of the generators'.

    Raises:
        DamagedError: more or less noise than the sampler asks for.
    """
    rows = iter(noise)

    def replay(like: Tensor, _generators: Sequence[torch.Generator]) -> Tensor:
        if (row := next(rows, None)) is None:
            raise DamagedError("there is noise of fewer steps than the sampler takes in the goldens")
        return row.to(like)

    with patch.object(sampler_classes, "row_noise", replay), patch.object(ancestral, "row_noise", replay):
        path = [x, *(step.x_next for step in trajectory(predict, sampler, schedule, x, [], conditions))]
    if sampler.eta and next(rows, None) is not None:
        raise DamagedError("there is noise of more steps than the sampler takes in the goldens")
    if isinstance(sampler, PLMS):
        del path[1]  # where the look-ahead stood
    return torch.stack(path)


def noise_of(recorded: Record, key: str, sampler: Sampler) -> Iterable[Tensor]:
    """The recorded noise; none of a deterministic sampler that has no recording."""
    return recorded[f"{key}.noise"] if sampler.eta or f"{key}.noise" in recorded else ()


def end_to_end(family: Family, network: nn.Module, conditions: Conditions) -> Iterator[Group]:
    """Whole trajectories around the converted network, with guidance where the index has a scale."""
    recorded = family.recorded
    timesteps = Group(f"{family.name}: timesteps", EXACT)
    for tag, settings in (family.settings["e2e"] or {}).items():
        key = f"e2e.{tag}"
        spacing = settings.get("skip", settings.get("discretize", "uniform"))
        sampler = sampler_of(settings["sampler"], settings["steps"], settings.get("eta", 0.0), spacing)
        timesteps.compare(steps_of(sampler, family.schedule), recorded[f"{key}.timesteps"])
        predict = Sampling(sampler, guidance=settings.get("scale", 1.0)).predictor(network)
        noise, golden = noise_of(recorded, key, sampler), recorded[f"{key}.traj"]
        tolerance = GROWTH * float(golden.abs().max()) + START
        group = Group(f"{family.name}: {key}", tolerance, absolute=True)
        group.compare(follow(predict, sampler, family.schedule, recorded[f"{key}.x_T"], noise, conditions), golden)
        yield group
    if timesteps.comparisons:
        yield timesteps


def samplers(cases: Sequence[Record], recorded: Record, ddim: Mapping[str, Any] | None) -> Iterator[Group]:
    """Samplers around a formula for the noise, in single and double precision.

    Args:
        cases: their settings.
        recorded: x_T, trajectories and noise.
        ddim: the schedule of cases that name no betas, which is that of the DDIM program.
    """
    groups: dict[str, Group] = {}
    timesteps = Group("samplers: timesteps", EXACT)
    for case in cases:
        sampler = sampler_of(case["kind"], case["steps"], case["eta"], case["discretize"])
        schedule = case_schedule(case, ddim)
        timesteps.compare(sampler.calls(schedule), case["model_call_timesteps"])
        timesteps.compare(steps_of(sampler, schedule), case["timesteps"])

        def predict(x: Tensor, t: Tensor, _conditions: Conditions, formula: str = case["eps_formula"]) -> Tensor:
            return evaluate(formula, {"x": x, "t": t.to(x).reshape(-1, *[1] * (x.dim() - 1))})

        for kind, (dtype, tolerance) in PRECISIONS.items():
            name = f"samplers: {case['kind']}, {str(dtype).removeprefix('torch.')}"
            group = groups.setdefault(name, Group(name, tolerance))
            noise = noise_of(recorded, case["id"], sampler)
            ours = follow(predict, sampler, schedule, recorded["x_T"].to(dtype), noise, Conditions())
            group.compare(ours, recorded[f"{case['id']}.{kind}"])
    yield from (*groups.values(), timesteps)


def case_schedule(case: Record, ddim: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The noise schedule of a sampler's case."""
    if case["linear_start"] is not None:
        betas = {"linear_start": case["linear_start"], "linear_end": case["linear_end"]}
        return compvis_checkpoint.training_schedule({"model": {"params": betas}})
    if ddim is None:
        raise DamagedError(
            f"{case['id']} has the betas of the DDIM program, and there is no network of it in the index"
        )
    return ddim


def published(lists: Mapping[str, Sequence[int]]) -> Iterator[Group]:
    """The timesteps of published commands, which are named by their options; `--timesteps` is one of DDIM's program."""
    group = Group("timesteps of the published commands", EXACT)
    for command, golden in lists.items():
        numbers = re.findall(r"(?:-c|steps|timesteps|quad) (\d+)", command)
        if not numbers:
            raise DamagedError(f"there is no number of steps in the command {command!r}")
        kind = "plms" if "--plms" in command else "generalized_steps" if "--timesteps" in command else "ddim"
        spacing = "quad" if re.search(r"\bquad\b", command) else "uniform"
        group.compare(steps_of(sampler_of(kind, int(numbers[0]), 0.0, spacing), LDM), golden)
    yield group


def schedules(recorded: Record, families: Sequence[Family]) -> Iterator[Group]:
    """Betas and products of alphas as the originals hold them, by the families in whose names' place they stand."""
    for name in sorted({key.rpartition(".")[0] for key in recorded}):
        for family in families:
            if re.sub("^ldm_", "", family.name) in name:
                golden = {kind: recorded[f"{name}.{kind}"] for kind in SCHEDULE if f"{name}.{kind}" in recorded}
                yield schedule_group(f"schedule {name}, {family.name}", family, golden)


def check_samplers(folder: Path, families: Sequence[Family]) -> tuple[list[Group], dict[str, Record]]:
    """Every comparison that is of no one network, and the tensors of each file that was read for them."""
    record = read_json(folder / "samplers.json")
    files = {name: read_recorded(folder / name) for name in ("samplers.safetensors", "schedules.safetensors")}
    ddim = next((family.schedule for family in families if family.ddim), None)
    groups = [
        *samplers(record["cases"], files["samplers.safetensors"], ddim),
        *published(record["timestep_lists_call_order"]),
        *schedules(files["schedules.safetensors"], families),
    ]
    return groups, files
