"""What a folder of diffusers' layout says of its scheduler, and of the noise that its network was trained on."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from tfmq_exp.core.file_kind import instead_of_text
from tfmq_exp.core.validate import number, whole

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


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON, or no names with values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: expected a folder of diffusers' layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {instead_of_text(path) or f'is damaged: {error}'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: expected names with values")
    return content


def scheduler_file(path: Path) -> Path | None:
    """The scheduler's configuration: in `scheduler/`, or in the folder itself; None without one."""
    files = [folder / CONFIG for folder in (path / "scheduler", path)]
    return next((file for file in files if file.is_file()), None)


def pipeline_class(path: Path) -> str | None:
    """The class of the pipeline that the folder's `model_index.json` names; None without one."""
    index = path / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return name if isinstance(name, str) else None


def scheduler_class(path: Path) -> str | None:
    """The class of the scheduler that the folder's `model_index.json` lists, and diffusers loads; None where it lists none."""
    index = path / "model_index.json"
    listed = read_json(index).get("scheduler") if index.is_file() else None
    name = listed[-1] if isinstance(listed, list) and listed else None
    return name if isinstance(name, str) else None


def check_former_names(config: Mapping[str, Any]) -> None:
    """ValueError for a setting under a name that diffusers no longer knows, and passes over without a word."""
    if config.get("predict_epsilon") is False and config.get("prediction_type") in (None, "epsilon"):
        raise ValueError("predict_epsilon=False is what diffusers now calls prediction_type=sample: write that instead")


def scheduler_defaults(kind: str) -> dict[str, Any]:
    """All settings of a kind of scheduler, with the values that it has by default."""
    arguments = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {name: argument.default for name, argument in arguments.items() if name != "self"}


def training_noise(file: Path) -> dict[str, Any]:
    """The noise that a network was trained on, as arguments of diffusers' schedulers.

    Args:
        file: a scheduler's configuration. What it leaves out is the default of its class.

    Raises:
        ValueError: no betas, or values that cannot be; the message has the key.
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
    """ValueError for a number of training timesteps that is none."""
    if not whole(count) or not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be a whole number from 1 to {MOST_TIMESTEPS}, got {count!r}")


def check_betas(noise: Mapping[str, Any], count: int) -> None:
    """ValueError for betas that are none: each must be a number above 0 and below 1, as many as there are timesteps."""
    betas = noise["trained_betas"]
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != count:
            given = len(betas) if isinstance(betas, list) else repr(betas)
            raise ValueError(f"trained_betas must be {count} numbers, as num_train_timesteps says, got {given}")
        if wrong := [beta for beta in betas if not is_share(beta)]:
            raise ValueError(f"trained_betas must be above 0 and below 1, got {wrong[0]!r}")
        return
    for key in ("beta_start", "beta_end"):
        if not is_share(noise[key]):
            raise ValueError(f"{key} must be a number above 0 and below 1, got {noise[key]!r}")


def is_share(value: Any) -> bool:
    """Whether a value is a number between 0 and 1."""
    return number(value) and 0 < value < 1
