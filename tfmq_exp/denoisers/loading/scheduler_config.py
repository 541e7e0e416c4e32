"""The scheduler of a folder of diffusers' layout, and the noise that its network was trained on."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from tfmq_exp.core.files import read_json
from tfmq_exp.core.validate import INNER_SHARE, whole

CONFIG = "scheduler_config.json"
# Those that are tested to sample as diffusers' own pipelines do.
KINDS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
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


def pipeline_class(path: Path) -> str | None:
    """The class of the pipeline that the folder's index names; None without one."""
    name = read_index(path).get("_class_name")
    return name if isinstance(name, str) else None


def scheduler_class(path: Path) -> str | None:
    """The class of the scheduler that the folder's index lists, and diffusers loads; None where it lists none."""
    listed = read_index(path).get("scheduler")
    name = listed[-1] if isinstance(listed, list) and listed else None
    return name if isinstance(name, str) else None


def check_former_names(config: Mapping[str, Any]) -> None:
    """ValueError for a setting under a name that diffusers no longer knows, and ignores."""
    if config.get("predict_epsilon") is False and config.get("prediction_type") in (None, "epsilon"):
        raise ValueError("predict_epsilon=False is what diffusers now calls prediction_type=sample: write that instead")


def default_settings(kind: type) -> dict[str, Any]:
    """All settings of a class of diffusers, with their default values."""
    arguments = inspect.signature(kind.__init__).parameters
    return {name: argument.default for name, argument in arguments.items() if name != "self"}


def scheduler_defaults(kind: str) -> dict[str, Any]:
    """`default_settings` of a scheduler by the name of its class."""
    return default_settings(getattr(diffusers, kind))


def training_noise(file: Path) -> dict[str, Any]:
    """The noise that a network was trained on, as arguments of diffusers' schedulers; ValueError for impossible betas.

    Args:
        file: a scheduler's configuration. A setting that is not in it has the default of its class.
    """
    config = read_json(file)
    name = config.get("_class_name")
    defaults = scheduler_defaults(name) if name in KINDS else {}
    found: dict[str, Any] = {key: config.get(key, defaults.get(key)) for key in (*NOISE, *USUAL)}
    if lacking := [key for key in NOISE if found[key] is None]:
        raise ValueError(f"{file} lacks {lacking[0]!r}: expected a scheduler of {', '.join(NOISE)}, got a {name!r}")
    try:
        check_former_names(config)
        check_count(found["num_train_timesteps"])
        check_betas(found, found["num_train_timesteps"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return {key: value for key, value in found.items() if key not in USUAL or value not in (None, USUAL[key])}


def check_count(count: Any) -> None:
    """ValueError for an impossible number of training timesteps."""
    if not whole(count) or not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be a whole number from 1 to {MOST_TIMESTEPS}, got {count!r}")


def check_betas(noise: Mapping[str, Any], count: int) -> None:
    """ValueError unless betas lie between 0 and 1, as many as there are timesteps."""
    betas = noise["trained_betas"]
    if betas is None:
        for key in ("beta_start", "beta_end"):
            if not INNER_SHARE.fits(noise[key]):
                raise ValueError(f"{key} must be {INNER_SHARE.right}, got {noise[key]!r}")
    elif not isinstance(betas, list) or len(betas) != count:
        given = len(betas) if isinstance(betas, list) else repr(betas)
        raise ValueError(f"trained_betas must be {count} numbers, as num_train_timesteps says, got {given}")
    elif wrong := [beta for beta in betas if not INNER_SHARE.fits(beta)]:
        raise ValueError(f"trained_betas must be above 0 and below 1, got {wrong[0]!r}")
