"""The scheduler of a diffusers folder as a sampler, with every setting that it has."""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch

from tfmq_exp.core.files import read_json
from tfmq_exp.core.validate import COUNT, POSITIVE, SHARE, SWITCH, check_fields, one_of
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
from tfmq_exp.sampling.samplers import scheduler_moves
from tfmq_exp.sampling.trajectory import Moves, Sampler

# Schedulers that these pipelines of diffusers use in place of the folder's.
CONVERTED = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
# Settings that StableDiffusionPipeline overrides, if the scheduler has them.
STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}
KNOWN = {  # kinds of settings that diffusers does not check; truth values are known by their defaults
    "prediction_type": one_of("epsilon", "sample", "v_prediction"),
    "variance_type": one_of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    **{"clip_sample_range": POSITIVE, "sample_max_value": POSITIVE, "dynamic_thresholding_ratio": SHARE},
}
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

    Raises:
        ValueError: a kind or a setting that is not supported, by its key.
    """

    kind: str  # name of its class, one of `KINDS`
    settings: Mapping[str, Any]  # its whole configuration
    num_inference_steps: int  # argument of its `set_timesteps`
    eta: float = 0.0  # how much noise DDIM's steps add, 0 to 1; 0 for every other kind

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=COUNT, eta=SHARE)
        if self.kind not in KINDS:
            raise ValueError(f"_class_name must be one of {', '.join(KINDS)}, got {self.kind!r}{OTHERS}")
        defaults = default_settings(self.kind)
        for key, value in self.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be a finite number, got {value}")
            kind = SWITCH if isinstance(defaults.get(key), bool) else KNOWN.get(key)
            if kind is not None and value is not None and not kind.fits(value):  # a text "false" would count as true
                raise ValueError(f"{key} must be {kind.right}, got {value!r}{OTHERS}")
        count, steps = self.settings["num_train_timesteps"], self.num_inference_steps
        if not 1 <= steps <= count:
            raise ValueError(f"{steps} sampler steps are not 1 to {count}, the folder's num_train_timesteps")
        if self.eta and "eta" not in inspect.signature(getattr(diffusers, self.kind).step).parameters:
            raise ValueError(f"a {self.kind} has no eta: it must be 0, got {self.eta}")
        self._dry_run()

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
        if wrong := [int(t) for t in found if not 0 <= t < count]:
            raise ValueError(f"{where}: {self.num_inference_steps} steps visit timestep {wrong[0]} of 0 .. {count - 1}")
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
        return scheduler_moves(self.scheduler(), self.eta)

    def _dry_run(self) -> None:
        """Take all steps with one number as the image; ValueError where the scheduler fails or divides by zero."""
        generators = [torch.Generator().manual_seed(0)]
        try:
            moves, x = self.start({}), torch.ones(1, 1, 1, 1)
            for call, t in enumerate(self._timesteps):
                x = moves.move(call, moves.input(call, x), x, generators)
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(f"it gives {float(x)} at timestep {t}")
        except Exception as error:  # diffusers does not check settings: they fail anywhere
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            usual = default_settings(self.kind)
            said = {key: v for key, v in self.settings.items() if key in DECISIVE or v != usual.get(key)}
            raise ValueError(
                f"a {self.kind} cannot sample {self.num_inference_steps} steps with eta={self.eta} and {said}: {reason}"
            ) from error


def _file_of(path: str | None) -> tuple[Path, Path]:
    """The scheduler's configuration of a folder, and the folder."""
    if path is None:
        raise ValueError(f"sampler=folder reads a folder of model=diffusers, and this model is none{OTHERS}")
    folder = Path(path)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist (nothing is downloaded)"
        raise FileNotFoundError(f"{path} {what}: sampler=folder reads a folder of diffusers' layout{OTHERS}")
    if (file := scheduler_file(folder)) is None:
        cache = "; it is a cache: give the folder below its snapshots/" if (folder / "snapshots").is_dir() else OTHERS
        raise FileNotFoundError(f"sampler=folder reads scheduler/{CONFIG}, and there is none in {path}{cache}")
    return file, folder


def read_scheduler(
    path: str | None, num_inference_steps: int, eta: float = 0.0, settings: Mapping[str, Any] | None = None
) -> Scheduler:
    """The scheduler of a folder as diffusers' pipeline of that folder uses it, with some settings changed; see `Scheduler`.

    Raises:
        FileNotFoundError: no scheduler in the folder.
        ValueError: a model without folder, a scheduler or a setting that is not supported.
    """
    file, folder = _file_of(path)
    config, changes, (pipeline, listed) = read_json(file), dict(settings or {}), listed_classes(folder)
    own = config.get("_class_name")
    kind = CONVERTED.get(pipeline or "", listed or own)
    try:
        check_former_names(config | changes)
        if kind not in KINDS:
            raise ValueError(f"_class_name must be one of {', '.join(KINDS)}, got {kind!r}{OTHERS}")
        if kind != own:
            log.warning("%s describes a %s; it is sampled as a %s, as model_index.json has it", file, own, kind)
        defaults = default_settings(kind)
        if unknown := sorted(changes.keys() - defaults.keys()):
            raise ValueError(f"sampler.settings.{unknown[0]}: a {kind} has no such setting")
        given = {key: value for key, value in config.items() if not key.startswith("_")} | changes
        if passed := [f"{key}={given[key]}" for key in sorted(given.keys() - defaults.keys()) if given[key]]:
            log.warning("%s: a %s has no %s; passed over, as diffusers does", file, kind, ", ".join(passed))
        known = defaults | {key: value for key, value in given.items() if key in defaults}
        for key, value in STABLE_DIFFUSION.items() if pipeline == "StableDiffusionPipeline" else ():
            if key in known.keys() - changes.keys() and known[key] != value:
                log.warning("%s=%s, as diffusers' StableDiffusionPipeline sets it whatever the folder says", key, value)
                known[key] = value
        check_count(known["num_train_timesteps"])
        full = getattr(diffusers, kind)(**known).config
        # JSON has no infinity, which some bounds are by default: these stay out
        return Scheduler(
            kind,
            {
                key: value
                for key, value in full.items()
                if not (key.startswith("_") or (value in (math.inf, -math.inf) and value == defaults[key]))
            },
            num_inference_steps,
            eta,
        )
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def replaced_settings(sampler: Sampler, path: Path) -> str:
    """A message with the settings of the folder's scheduler that another sampler ignores; empty where there are none."""
    file = scheduler_file(path) if path.is_dir() else None
    if file is None or isinstance(sampler, Scheduler):
        return ""
    config, known = read_json(file), {*NOISE, *USUAL}
    left = [
        f"{key}={value}"
        for key, value in config.items()
        if not (key.startswith("_") or key in known or value in (None, False))
    ]
    name = type(sampler).__name__
    return f"{name} samples in place of the folder's {config.get('_class_name')}: its {', '.join(left)} do not count"
