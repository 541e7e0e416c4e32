"""Samplers of flow matching and real timesteps as diffusers' pipelines set them, with diffusers' numbers."""

import json
from pathlib import Path
from typing import Any

from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler, finite

FLOW = Path(__file__).parents[1] / "goldens/transformers/flow"
EDM = Path(__file__).parents[1] / "goldens/transformers/edm"
CASES: dict[str, Any] = json.loads((FLOW / "samplers.json").read_text(encoding="utf-8"))["cases"]


def flow_sampler(name: str) -> Scheduler | SigmaScheduler:
    """The sampler of a case."""
    case = CASES[name]
    settings = finite(case["config"], default_settings(case["scheduler"]))
    given = case["set_timesteps"]
    made = SigmaScheduler if "sigmas" in given or "mu" in given else Scheduler
    return made(case["scheduler"], settings, **given)
