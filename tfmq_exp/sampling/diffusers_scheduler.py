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
import numpy as np

from tfmq_exp.core.files import read_json
from tfmq_exp.core.validate import AMOUNT, COUNT, SHARE, check_fields, number, optional, sequence_of
from tfmq_exp.core.validate import Kind as ValueKind
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
from tfmq_exp.sampling.network_convention import PipelineSampler
from tfmq_exp.sampling.samplers import scheduler_moves
from tfmq_exp.sampling.scheduler_checks import OTHERS, check_settings, checked_timesteps, try_steps
from tfmq_exp.sampling.trajectory import Moves, Sampler

# Schedulers that these pipelines of diffusers use in place of the folder's.
CONVERTED = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
# Settings that StableDiffusionPipeline overrides, if the scheduler has them.
STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}
NUMBER = ValueKind("a finite number", number)
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
        check_settings(self.kind, self.settings)
        count, steps = self.settings["num_train_timesteps"], self.num_inference_steps
        if not 1 <= steps <= count:
            raise ValueError(f"{steps} sampler steps are not 1 to {count}, the folder's num_train_timesteps")
        if self.eta and "eta" not in inspect.signature(getattr(diffusers, self.kind).step).parameters:
            raise ValueError(f"a {self.kind} has no eta: it must be 0, got {self.eta}")
        asked = f"{steps} steps with eta={self.eta}"
        try_steps(self.kind, self.settings, asked, lambda: self.start({}), lambda: self._timesteps)

    @cached_property
    def _timesteps(self) -> tuple[float | int, ...]:
        return checked_timesteps(self.kind, self.settings, self.scheduler().timesteps, self.num_inference_steps)

    def scheduler(self) -> Any:
        """A new scheduler of diffusers with its timesteps set."""
        made: Any = getattr(diffusers, self.kind)(**self.settings)
        made.set_timesteps(self.num_inference_steps)
        return made

    def calls(self, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
        """The scheduler's timesteps; those of second order have some of them twice."""
        return self._timesteps

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        return scheduler_moves(self.scheduler(), self.eta)


@dataclass(frozen=True)
class SigmaScheduler:
    """A scheduler of diffusers whose steps a pipeline sets by more than their number: by sigmas, by a shift, or by both.

    Raises:
        ValueError: a kind, a setting or an argument that is not supported, by its key.
    """

    kind: str  # name of its class, one of `KINDS`
    settings: Mapping[str, Any]  # its whole configuration
    num_inference_steps: int | None = None  # arguments of its `set_timesteps`; this one in place of sigmas
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None  # of `use_dynamic_shifting`: pipelines make it from the image's size

    def __post_init__(self) -> None:
        check_fields(self, num_inference_steps=optional(COUNT), sigmas=optional(sequence_of(AMOUNT)))
        check_fields(self, mu=optional(NUMBER))
        check_settings(self.kind, self.settings)
        if (self.num_inference_steps is None) == (not self.sigmas):
            raise ValueError("give num_inference_steps or sigmas: with sigmas the number of steps is fixed")
        if not self.sigmas and self.mu is None:
            raise ValueError("give sigmas or mu: a Scheduler samples by a number of steps alone")
        object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)) if self.sigmas else None)
        takes = {*inspect.signature(getattr(diffusers, self.kind).set_timesteps).parameters}
        takes -= {"sigmas"} if self.kind.startswith("EDM") else set()  # which are none there, but shares of the way
        if wrong := sorted(self.arguments.keys() - takes):
            raise ValueError(f"a {self.kind} takes no {wrong[0]}, got {self.arguments[wrong[0]]}")
        if self.mu is not None and not self.settings.get("use_dynamic_shifting"):
            raise ValueError(f"mu={self.mu} has no effect: use_dynamic_shifting is not set")
        asked = " ".join(f"{key}={value}" for key, value in self.arguments.items())
        try_steps(self.kind, self.settings, f"with {asked}", lambda: self.start({}), lambda: self._timesteps)

    @property
    def eta(self) -> float:
        return 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `set_timesteps` that are given."""
        given = {name: getattr(self, name) for name in ("num_inference_steps", "sigmas", "mu")}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def _timesteps(self) -> tuple[float | int, ...]:
        timesteps = self.scheduler().timesteps
        return checked_timesteps(self.kind, self.settings, timesteps, len(timesteps))

    def scheduler(self) -> Any:
        """A new scheduler of diffusers with its timesteps set."""
        made: Any = getattr(diffusers, self.kind)(**self.settings)
        # some kinds calculate with what they are given
        made.set_timesteps(**{k: np.array(v) if k == "sigmas" else v for k, v in self.arguments.items()})
        return made

    def calls(self, schedule: Mapping[str, Any]) -> tuple[float | int, ...]:
        """The scheduler's timesteps; those of second order have some of them twice."""
        return self._timesteps

    def start(self, schedule: Mapping[str, Any]) -> Moves:
        return scheduler_moves(self.scheduler())


def default_scheduler(kind: str, num_inference_steps: int, settings: Mapping[str, Any] | None = None) -> Scheduler:
    """A scheduler of diffusers with its default settings, some of them changed; ValueError for one that it does not have."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if unknown := sorted((settings or {}).keys() - default_settings(kind).keys()):
        raise ValueError(f"sampler.settings.{unknown[0]}: a {kind} has no such setting")
    full = getattr(diffusers, kind)(**(settings or {})).config
    known = {
        key: value for key, value in full.items() if not key.startswith("_") and value not in (math.inf, -math.inf)
    }
    return Scheduler(kind, known, num_inference_steps)


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
    path: str | None,
    num_inference_steps: int,
    eta: float = 0.0,
    settings: Mapping[str, Any] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Scheduler | SigmaScheduler:
    """The scheduler of a folder as diffusers' pipeline of that folder uses it, with some settings changed.

    Args:
        path: of the folder.
        num_inference_steps: of the sampler.
        eta: see `Scheduler`.
        settings: changes, by diffusers' names.
        sigmas: see `SigmaScheduler`; they decide the number of steps.
        mu: see `SigmaScheduler`.

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
        check_settings(kind, finite(known, defaults))
        complete = finite(getattr(diffusers, kind)(**known).config, defaults)
        if sigmas is None and mu is None:
            return Scheduler(kind, complete, num_inference_steps, eta)
        if eta:
            raise ValueError(f"eta must be 0 with sigmas or mu, got {eta}")
        steps, given = (num_inference_steps, None) if sigmas is None else (None, tuple(sigmas))
        return SigmaScheduler(kind, complete, steps, given, mu)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, ArithmeticError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def finite(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without diffusers' own, and without the bounds that are infinite by default: JSON has no infinity."""
    return {
        key: value
        for key, value in settings.items()
        if not (key.startswith("_") or (value in (math.inf, -math.inf) and value == defaults[key]))
    }


def replaced_settings(sampler: Sampler, path: Path) -> str:
    """A message with the settings of the folder's scheduler that another sampler ignores; empty where there are none."""
    file = scheduler_file(path) if path.is_dir() else None
    sampler = sampler.sampler if isinstance(sampler, PipelineSampler) else sampler
    if file is None or isinstance(sampler, Scheduler | SigmaScheduler):
        return ""
    config, known = read_json(file), {*NOISE, *USUAL}
    left = [
        f"{key}={value}"
        for key, value in config.items()
        if not (key.startswith("_") or key in known or value in (None, False))
    ]
    name = type(sampler).__name__
    return f"{name} samples in place of the folder's {config.get('_class_name')}: its {', '.join(left)} do not count"
