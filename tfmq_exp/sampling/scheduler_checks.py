"""Checks of a scheduler of diffusers before it samples: kinds of its settings, the timesteps it visits, and a trial of all steps."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.validate import POSITIVE, SHARE, SWITCH, one_of
from tfmq_exp.denoisers.loading.scheduler_config import CONTINUOUS, FLOW, KINDS, check_finite, default_settings
from tfmq_exp.sampling.trajectory import Moves, exact_numbers

PREDICTIONS = ("epsilon", "sample", "v_prediction")
KNOWN = {  # kinds of settings that diffusers does not check; truth values are known by their defaults
    "variance_type": one_of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "sigma_schedule": one_of("karras", "exponential"),
    **dict.fromkeys(("clip_sample_range", "sample_max_value"), POSITIVE),
    **dict.fromkeys(("shift", "flow_shift", "sigma_min", "sigma_max", "sigma_data", "rho"), POSITIVE),
    "dynamic_thresholding_ratio": SHARE,
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


def check_settings(kind: str, settings: Mapping[str, Any]) -> None:
    """ValueError for a kind or a setting that is not supported, by its key."""
    if kind not in KINDS:
        raise ValueError(f"_class_name must be one of {', '.join(KINDS)}, got {kind!r}{OTHERS}")
    defaults, flow = default_settings(kind), settings.get("use_flow_sigmas")
    known = KNOWN | {"prediction_type": one_of(*PREDICTIONS, *([FLOW] if flow else []))}
    check_finite(kind, settings)
    for key, value in settings.items():
        right = SWITCH if isinstance(defaults.get(key), bool) else known.get(key)
        if right is not None and value is not None and not right.fits(value):  # a text "false" would count as true
            needed = ", with use_flow_sigmas=True" if value == FLOW and "use_flow_sigmas" in defaults else ""
            raise ValueError(f"{key} must be {right.right}, got {value!r}{needed}{OTHERS}")


def checked_timesteps(kind: str, settings: Mapping[str, Any], timesteps: Tensor, steps: int) -> tuple[float | int, ...]:
    """Exact timesteps of all calls: whole numbers where a scheduler with betas visits nothing else.

    Raises:
        ValueError: a timestep that is not finite, or outside the training.
    """
    found = exact_numbers(timesteps)
    if wrong := [t for t in found if not math.isfinite(t)]:
        raise ValueError(f"it calls the network at timestep {wrong[0]}")
    if kind in CONTINUOUS:
        return found
    last = settings["num_train_timesteps"] - 1
    outside = [t for t in found if not 0 <= t <= last]
    if outside and settings.get("timestep_type") != "continuous":  # which counts in logarithms of sigma
        where = ", ".join(f"{key}={value}" for key in SPACING if (value := settings.get(key)) not in (None, False))
        raise ValueError(f"{where}: {steps} steps visit timestep {outside[0]:.10g} of 0 .. {last}")
    return tuple(map(int, found)) if all(t == int(t) for t in found) else found


def try_steps(
    kind: str,
    settings: Mapping[str, Any],
    asked: str,
    start: Callable[[], Moves],
    calls: Callable[[], tuple[float | int, ...]],
) -> None:
    """Take all steps with one number as the image.

    Args:
        kind: name of the scheduler's class.
        settings: its whole configuration.
        asked: its steps, in words for the error.
        start: makes the moves of one trajectory.
        calls: gives the timesteps.

    Raises:
        ValueError: the scheduler fails, or divides by zero.
    """
    generators = [torch.Generator().manual_seed(0)]
    try:
        moves, x = start(), torch.ones(1, 1, 1, 1)
        for call, t in enumerate(calls()):
            x = moves.move(call, moves.input(call, x), x, generators)
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"it gives {float(x)} at timestep {t}")
    except Exception as error:  # diffusers does not check settings: they fail anywhere
        reason = " ".join(f"{error}".split())[:300] or type(error).__name__
        usual = default_settings(kind)
        said = {key: v for key, v in settings.items() if key in DECISIVE or v != usual.get(key)}
        raise ValueError(f"a {kind} cannot sample {asked} and {said}: {reason}") from error
