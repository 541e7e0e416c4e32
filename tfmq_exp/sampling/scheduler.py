"""The scheduler of a diffusers folder as a sampler, with every setting that it has."""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from tfmq_exp.core.files import read_json
from tfmq_exp.core.validate import COUNT, POSITIVE, SHARE, SWITCH, check_fields
from tfmq_exp.denoisers.loading.scheduler_config import (
    CONFIG,
    KINDS,
    NOISE,
    USUAL,
    check_count,
    check_former_names,
    default_settings,
    listed_classes,
    scheduler_file,
)
from tfmq_exp.sampling.sampler import Moves, Sampler

# Schedulers that these pipelines of diffusers use in place of the folder's.
CONVERTED = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
# Settings that StableDiffusionPipeline overrides, if the scheduler has them.
STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}
CHOICES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
BOUNDS = {"clip_sample_range": POSITIVE, "sample_max_value": POSITIVE, "dynamic_thresholding_ratio": SHARE}
# The settings that decide which timesteps are visited.
SPACING = (
    *("timestep_spacing", "steps_offset", "interpolation_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"),
)
# The settings that decide whether a scheduler can sample at all.
DECISIVE = (
    *("prediction_type", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "final_sigmas_type"),
    *("beta_schedule", "algorithm_type", "solver_type", "thresholding"),
)
OTHERS = "; sampler=ddim, plms or dpm_solver sample without it"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers as a sampler.

    Args:
        kind: name of its class, one of `KINDS`.
        settings: its whole configuration.
        num_inference_steps: argument of its `set_timesteps`.
        eta: how much noise DDIM's steps add, 0 to 1; 0 for every other kind.

    Raises:
        ValueError: a kind or a setting that is not supported, by its key.
    """

    kind: str
    settings: Mapping[str, Any]
    num_inference_steps: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, eta=SHARE)
        if self.kind not in KINDS:
            raise ValueError(f"_class_name must be one of {', '.join(KINDS)}, got {self.kind!r}{OTHERS}")
        for key, choices in CHOICES.items():
            if (value := self.settings.get(key, choices[0])) not in choices:
                raise ValueError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}{OTHERS}")
        defaults = default_settings(self.kind)
        for key, value in self.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, got {value}")
            right = SWITCH if isinstance(defaults.get(key), bool) else BOUNDS.get(key)
            if right is not None and value is not None and not right.fits(value):  # a text "false" would count as true
                raise ValueError(f"{key} must be {right.right}, got {value!r}")
        count = self.settings["num_train_timesteps"]
        if not 1 <= self.num_inference_steps <= count:
            raise ValueError(
                f"{self.num_inference_steps} sampler steps are not 1 to {count}, the folder's num_train_timesteps"
            )
        if self.eta and "eta" not in self._arguments:
            raise ValueError(f"a {self.kind} has no eta: it must be 0, got {self.eta}")
        self._dry_run()

    @cached_property
    def _arguments(self) -> Mapping[str, Any]:
        return inspect.signature(getattr(diffusers, self.kind).step).parameters

    @cached_property
    def _timesteps(self) -> tuple[int, ...]:
        found: list[float] = self.scheduler().timesteps.tolist()
        count = self.settings["num_train_timesteps"]
        where = ", ".join(f"{key}={value}" for key in SPACING if (value := self.settings.get(key)) not in (None, False))
        if wrong := [t for t in found if t != int(t)]:
            raise ValueError(
                f"{where}: the {self.kind} calls the network at timestep {wrong[0]:.3f}, and timesteps must be whole "
                f"numbers, as +sampler.settings.timestep_spacing=leading has them{OTHERS}"
            )
        if wrong := [t for t in found if not 0 <= t < count]:
            raise ValueError(
                f"{where}: {self.num_inference_steps} steps visit timestep {int(wrong[0])} of 0 .. {count - 1}"
            )
        return tuple(int(t) for t in found)

    def scheduler(self) -> Any:
        """A new scheduler of diffusers with its timesteps set."""
        made: Any = getattr(diffusers, self.kind)(**self.settings)
        made.set_timesteps(self.num_inference_steps)
        return made

    def calls(self, schedule: Mapping[str, Any]) -> tuple[int, ...]:
        """The scheduler's timesteps; those of second order have some of them twice."""
        return self._timesteps

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        """Moves of a new scheduler, which remembers earlier predictions and its step."""
        made = self.scheduler()

        def scaled(call: int, x: Tensor) -> Tensor:
            return made.scale_model_input(x, made.timesteps[call])

        def move(call: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            options: dict[str, Any] = {"return_dict": False}
            if "generator" in self._arguments:
                options["generator"] = list(generators)
            if "eta" in self._arguments:
                options["eta"] = self.eta
            return made.step(prediction, made.timesteps[call], x, **options)[0]

        return Moves(move, scaled, float(made.init_noise_sigma))

    def _dry_run(self) -> None:
        """Take all steps with one number as the image; ValueError where the scheduler fails or divides by zero."""
        generators = [torch.Generator().manual_seed(0)]
        try:
            moves, x = self.start({}), torch.ones(1, 1, 1, 1)
            for call in range(len(self._timesteps)):
                x = moves.move(call, moves.input(call, x), x, generators)
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(f"it gives {float(x)} at timestep {self._timesteps[call]}")
        except Exception as error:  # diffusers does not check settings: they fail anywhere
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            said = {key: value for key, value in self.settings.items() if key in DECISIVE}
            raise ValueError(
                f"a {self.kind} cannot sample {self.num_inference_steps} steps with eta={self.eta} and {said}: {reason}"
            ) from error


def read_scheduler(
    path: str | None, num_inference_steps: int, eta: float = 0.0, settings: Mapping[str, Any] | None = None
) -> Scheduler:
    """The scheduler of a folder, as diffusers' pipeline of that folder uses it.

    Args:
        path: the folder, or None for a model that has none (an error).
        num_inference_steps: see `Scheduler`.
        eta: see `Scheduler`.
        settings: changes of the folder's settings, by diffusers' names.

    Raises:
        FileNotFoundError: no scheduler in the folder.
        ValueError: a scheduler or a setting that is not supported.
    """
    if path is None:
        raise ValueError(f"sampler=folder reads a folder of model=diffusers, and this model is none{OTHERS}")
    folder = Path(path)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist (nothing is downloaded)"
        raise FileNotFoundError(
            f"{path} {what}: sampler=folder reads a folder of diffusers' layout (path=FOLDER){OTHERS}"
        )
    if (file := scheduler_file(folder)) is None:
        cache = "; it is a cache: give the folder below its snapshots/" if (folder / "snapshots").is_dir() else OTHERS
        raise FileNotFoundError(f"sampler=folder reads scheduler/{CONFIG}, and there is none in {path}{cache}")
    raw, (pipeline, listed) = read_json(file), listed_classes(folder)
    own = raw.get("_class_name")
    kind = CONVERTED.get(pipeline or "", listed or own)
    try:
        check_former_names(raw | dict(settings or {}))
        if kind not in KINDS:
            raise ValueError(f"_class_name must be one of {', '.join(KINDS)}, got {kind!r}{OTHERS}")
        if kind != own:
            log.warning("%s describes a %s; it is sampled as a %s, as model_index.json has it", file, own, kind)
        defaults = default_settings(kind)
        if unknown := sorted(set(settings or {}) - set(defaults)):
            raise ValueError(f"sampler.settings.{unknown[0]}: a {kind} has no such setting")
        given = {key: value for key, value in raw.items() if not key.startswith("_")} | dict(settings or {})
        if passed := [f"{key}={given[key]}" for key in sorted(set(given) - set(defaults)) if given[key]]:
            log.warning("%s: a %s has no %s; passed over, as diffusers does", file, kind, ", ".join(passed))
        known = {key: value for key, value in given.items() if key in defaults}
        if pipeline == "StableDiffusionPipeline":
            known |= overridden(
                {key: value for key, value in (defaults | known).items() if key not in (settings or {})}
            )
        check_count((defaults | known)["num_train_timesteps"])
        config = getattr(diffusers, kind)(**known).config
        full = {key: value for key, value in config.items() if not key.startswith("_")}
        # JSON has no infinity, which some bounds are by default: these stay out
        infinite = {key for key, value in full.items() if value in (math.inf, -math.inf) and value == defaults[key]}
        return Scheduler(
            kind, {key: value for key, value in full.items() if key not in infinite}, num_inference_steps, eta
        )
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def replaced_settings(sampler: Sampler, path: Path) -> str:
    """A message with the settings of the folder's scheduler that another sampler ignores; empty where there are none."""
    file = scheduler_file(path) if path.is_dir() else None
    if file is None or isinstance(sampler, Scheduler):
        return ""
    config = read_json(file)
    known = {*NOISE, *USUAL}
    settings = {k: v for k, v in config.items() if not (k.startswith("_") or k in known or v in (None, False))}
    left = [f"{key}={value}" for key, value in settings.items()]
    name = type(sampler).__name__
    return f"{name} samples in place of the folder's {config.get('_class_name')}: its {', '.join(left)} do not count"


def overridden(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler that StableDiffusionPipeline overrides; each change is logged."""
    changed = {key: value for key, value in STABLE_DIFFUSION.items() if key in settings and settings[key] != value}
    for key, value in changed.items():
        log.warning("%s=%s, as diffusers' StableDiffusionPipeline sets it whatever the folder says", key, value)
    return changed
