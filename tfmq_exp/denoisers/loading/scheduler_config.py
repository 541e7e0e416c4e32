"""The scheduler of a folder of diffusers' layout, and the noise that its network was trained on."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from tfmq_exp.core.files import read_json
from tfmq_exp.core.validate import INNER_SHARE, whole

CONFIG = "scheduler_config.json"
# Values of `prediction_type` for trainings without betas; the second is ours: the network's output under EDM's preconditioning
# (arXiv 2206.00364, eq. 7).
FLOW, EDM = "flow_prediction", "edm"
# Kinds whose training has no betas: timesteps are real numbers; and what their networks predict.
CONTINUOUS = {
    **dict.fromkeys(("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), FLOW),
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), EDM),
}
# Those that are tested to sample as diffusers' own pipelines do.
KINDS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("LCMScheduler", "CogVideoXDDIMScheduler"),
    *CONTINUOUS,
)
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
# Parts of the training noise that most schedulers leave at these values.
USUAL = {"trained_betas": None, "rescale_betas_zero_snr": False, "prediction_type": "epsilon"}
MOST_TIMESTEPS = 100_000


def scheduler_file(path: Path) -> Path | None:
    """The scheduler's configuration: in `scheduler/`, or in the folder itself; None without one."""
    files = [folder / CONFIG for folder in (path / "scheduler", path)]
    return next((file for file in files if file.is_file()), None)


def read_index(path: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline's folder; empty without one."""
    index = path / "model_index.json"
    return read_json(index) if index.is_file() else {}


def listed_classes(path: Path) -> tuple[str | None, str | None]:
    """The classes of the pipeline and of its scheduler that the folder's index names; None where it names none."""
    index = read_index(path)
    pipeline, scheduler = index.get("_class_name"), index.get("scheduler")
    last = scheduler[-1] if isinstance(scheduler, list) and scheduler else None
    return (pipeline if isinstance(pipeline, str) else None, last if isinstance(last, str) else None)


def check_former_names(config: Mapping[str, Any]) -> None:
    """ValueError for a setting under a name that diffusers no longer knows, and ignores."""
    if config.get("predict_epsilon") is False and config.get("prediction_type") in (None, "epsilon"):
        raise ValueError("predict_epsilon=False is what diffusers now calls prediction_type=sample: write that instead")


def default_settings(kind: type | str) -> dict[str, Any]:
    """All settings of a class of diffusers, itself or by its name, with their default values."""
    found = getattr(diffusers, kind) if isinstance(kind, str) else kind
    arguments = inspect.signature(found.__init__).parameters
    return {name: argument.default for name, argument in arguments.items() if name != "self"}


def training_noise(file: Path) -> dict[str, Any]:
    """The noise that a network was trained on, as arguments of diffusers' schedulers; ValueError for impossible betas.

    Where the training has no betas, these are left out, and `prediction_type` says what the network predicts.
    """
    config = read_json(file)
    name = config.get("_class_name")
    defaults = default_settings(name) if name in KINDS else {}
    predicted = predicted_without_betas(config)
    keys = ("num_train_timesteps",) if predicted else (*NOISE, *USUAL)
    found: dict[str, Any] = {key: config.get(key, defaults.get(key)) for key in keys}
    if lacking := [key for key in NOISE if key in found and found[key] is None]:
        raise ValueError(f"{file} lacks {lacking[0]!r}: expected a scheduler of {', '.join(NOISE)}, got a {name!r}")
    try:
        check_former_names(config)
        check_count(found["num_train_timesteps"])
        if predicted:
            return {**found, "prediction_type": predicted}
        check_betas(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return {key: value for key, value in found.items() if key not in USUAL or value not in (None, USUAL[key])}


def predicted_without_betas(config: Mapping[str, Any]) -> str | None:
    """The prediction of a network whose training has no betas, by its scheduler's configuration; None for any other network."""
    if (name := config.get("_class_name")) in KINDS and name in CONTINUOUS:
        return CONTINUOUS[name]
    return FLOW if config.get("prediction_type") == FLOW else None


def check_count(count: Any) -> None:
    """ValueError for an impossible number of training timesteps."""
    if not whole(count) or not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be a whole number from 1 to {MOST_TIMESTEPS}, got {count!r}")


def check_finite(kind: str, config: Mapping[str, Any]) -> None:
    """ValueError, by its key, for a setting of this class that is NaN or infinite, unless it is so by default."""
    for key, default in default_settings(kind).items():
        value = config.get(key, default)
        if isinstance(value, float) and not math.isfinite(value) and value != default:
            raise ValueError(f"{key} must be a finite number, got {value}")


def check_betas(noise: Mapping[str, Any]) -> None:
    """ValueError unless betas lie between 0 and 1, as many as there are timesteps."""
    betas, count = noise["trained_betas"], noise["num_train_timesteps"]
    if betas is not None and (not isinstance(betas, list) or len(betas) != count):
        given = len(betas) if isinstance(betas, list) else repr(betas)
        raise ValueError(f"trained_betas must be {count} numbers, as num_train_timesteps says, got {given}")
    given = [(key, noise[key]) for key in ("beta_start", "beta_end")] if betas is None else []
    for key, beta in [*given, *(("trained_betas", beta) for beta in betas or ())]:
        if not INNER_SHARE.fits(beta):
            raise ValueError(f"{key} must be {INNER_SHARE.right}, got {beta!r}")
