"""Schedulers of diffusers with default settings, for networks that come without a folder."""

import math
from collections.abc import Mapping
from typing import Any

import diffusers

from tfmq_exp.denoisers.loading.scheduler_config import KINDS, default_settings
from tfmq_exp.sampling.diffusers_scheduler import Scheduler


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
