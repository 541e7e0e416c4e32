"""What is wrong with a job by its configuration alone. Light to import: a typing error is told before anything slow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tfmq_exp.experiment.folders import check_folders

GOALS = ("trajectory", "weights", "activations", "correction", "images", "scores")
DIAGNOSE, EXPORT = "diagnose", "export"  # these leave the way to scores once the model is finished


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Args:
        right: in words.
        fits: whether a value is one.
    """

    right: str
    fits: Callable[[Any], bool]


def whole(value: Any) -> bool:
    """Python counts truth values as integers; nobody else does."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    """Finite, too."""
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


COUNT = Kind("a whole number, at least 1", lambda value: whole(value) and value >= 1)
ANY_COUNT = Kind("a whole number, at least 0", lambda value: whole(value) and value >= 0)
SEED = Kind("a whole number from 0 to 2**63 - 1", lambda value: whole(value) and 0 <= value < 2**63)
THREADS = Kind(f"{COUNT.right}, or null", lambda value: value is None or COUNT.fits(value))
RATE = Kind("a number above 0", lambda value: number(value) and value > 0)
AMOUNT = Kind("a number, at least 0", lambda value: number(value) and value >= 0)
BOUND = Kind(f"{RATE.right}, or null", lambda value: value is None or RATE.fits(value))
SHARE = Kind("a number from 0 to 1", lambda value: number(value) and 0 <= value <= 1)
POSITIVE_SHARE = Kind("a number above 0, at most 1", lambda value: number(value) and 0 < value <= 1)
DECAY = Kind("a number, at least 0 and below 1", lambda value: number(value) and 0 <= value < 1)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
GOAL = Kind(f"one of {', '.join((*GOALS, DIAGNOSE, EXPORT))}", lambda value: value in (*GOALS, DIAGNOSE, EXPORT))

COUNTS = (
    "steps",
    "images",
    "calibration_images",
    "calibration_every",
    "diagnostic_images",
    "iterations",
    "recon_batch",
    "scale_iterations",
    "normal_samples",
    "correction_images",
    "qat_iterations",
    "qat_batch",
    "qat_observed",
    "encoding_width",
)
RATES = (
    "learning_rate",
    "scale_learning_rate",
    "joint_scale_learning_rate",
    "qat_learning_rate",
    "qat_range_rate",
)
KINDS = {
    "goal": GOAL,
    "seed": SEED,
    **dict.fromkeys(("dry_run", "repeat", "runtime.estimate", "runtime.traceback"), SWITCH),
    **{f"model.protocol.{name}": COUNT for name in COUNTS},
    **{f"model.protocol.{name}": RATE for name in RATES},
    "model.protocol.qat_warmup": ANY_COUNT,
    "model.protocol.qat_average": DECAY,
    "model.protocol.qat_mirrored": SWITCH,
    "method.weights.protocol.learning_rate": RATE,
    "method.weights.protocol.range_rate": AMOUNT,
    "method.weights.protocol.weight_decay": AMOUNT,
    "method.weights.protocol.first_rate": POSITIVE_SHARE,
    "method.weights.protocol.average": DECAY,
    "method.weights.protocol.clip": BOUND,
    "method.weights.protocol.untold": SHARE,
    "model.protocol.eta": AMOUNT,
    **dict.fromkeys(("runtime.batch", "runtime.processes", "runtime.parts"), COUNT),
    **dict.fromkeys(("runtime.cache_gib", "runtime.checkpoint_minutes"), AMOUNT),
    "runtime.threads": THREADS,
    **dict.fromkeys(("diagnosis.samples", "diagnosis.trajectories"), COUNT),
}
ABSENT = object()


def check(cfg: DictConfig) -> None:
    """Look at a job before it begins.

    Raises:
        ValueError: a value that cannot be right, by its key, with what would be; a method that goes by another's name; an export for no engine;
            folders inside one another.
    """
    for key, kind in KINDS.items():
        value = OmegaConf.select(cfg, key, default=ABSENT)  # a model of one's own may do without some of them
        if value is not ABSENT and not kind.fits(value):
            raise ValueError(f"{key} must be {kind.right}, got {value!r}")
    check_parts(cfg)
    for key in sorted(OmegaConf.missing_keys(cfg)):
        if key.startswith("data."):  # nothing else is asked for before it is needed
            raise ValueError(f"{key} has no value: give it one, {key}=...")
    if cfg.goal == EXPORT and cfg.engine is None:
        raise ValueError("goal=export needs an engine to export for: engine=openvino, onednn or torchao")
    hydra = HydraConfig.get()
    runtime = hydra.runtime
    check_folders(cfg, Path(runtime.output_dir), moves=bool(hydra.job.chdir))
    folders = [Path(source.path) / "method" for source in runtime.config_sources if source.schema == "file"]
    check_name(
        cfg.method.name, str(runtime.choices["method"]), {path.stem for d in folders for path in d.glob("*.yaml")}
    )


def check_parts(cfg: DictConfig) -> None:
    """ValueError for processes without a part of the batch where the scale of float16's gradients needs one."""
    precision = OmegaConf.select(cfg, "method.weights.protocol.precision")
    if precision == "16-mixed" and cfg.runtime.processes > cfg.runtime.parts:
        raise ValueError(
            f"at precision 16-mixed every process needs a part of the batch: runtime.parts must be at least "
            f"{cfg.runtime.processes}, the number of processes, got {cfg.runtime.parts}"
        )


def check_name(name: str, chosen: str, methods: set[str]) -> None:
    """A method's results stand under its name.

    Args:
        name: that it has.
        chosen: its file, without the ending.
        methods: all files of the group.

    Raises:
        ValueError: the name is that of another file.
    """
    if name != chosen and name in methods:
        raise ValueError(
            f"method={chosen} has method.name={name}, the name of another method, under which its results would stand: "
            f"write `name: {chosen}` below the defaults of method/{chosen}.yaml"
        )
