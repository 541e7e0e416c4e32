"""What is wrong with a job by its configuration alone. Light to import: a typing error is told before anything slow."""

import re
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from tfmq_exp.cli.folders import check_folders, check_images_apart
from tfmq_exp.core.validate import (
    AMOUNT,
    ANY_COUNT,
    COUNT,
    DECAY,
    POSITIVE,
    POSITIVE_SHARE,
    RATE,
    SEED,
    SHARE,
    SWITCH,
    Kind,
    number,
    optional,
    whole,
)

GOALS = ("trajectory", "weights", "activations", "correction", "images", "scores")
DIAGNOSE, EXPORT = "diagnose", "export"  # these leave the way to scores once the model is finished
FEWEST_SCORED = 2  # images: one has no covariance
BITS, FLOAT_BITS = range(2, 9), "32"  # the latter in a name, for what stays float
MINUTES = Kind("a number from 0 to 525600, a year", lambda value: number(value) and 0 <= value <= 525600)
TEXT = Kind("a text", lambda value: isinstance(value, str))
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
FLAGS = ("dry_run", "repeat", "runtime.estimate", "runtime.traceback", "eval.kid", "eval.precision_recall")
KINDS = {
    "goal": GOAL,
    "seed": SEED,
    **dict.fromkeys((*FLAGS, "model.denoiser.ema", "model.tie_qkv"), SWITCH),
    **dict.fromkeys(("eval.batch", "eval.manifold_images", "model.denoiser.decode_rows"), COUNT),
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
    "method.weights.protocol.clip": optional(POSITIVE),
    "method.weights.protocol.untold": SHARE,
    "model.protocol.eta": SHARE,
    "model.sampling.guidance": AMOUNT,
    **dict.fromkeys(("runtime.batch", "runtime.processes", "runtime.parts"), COUNT),
    "runtime.cache_gib": AMOUNT,
    "runtime.cache_dir": optional(TEXT),
    "runtime.checkpoint_minutes": MINUTES,
    "runtime.threads": optional(COUNT),
    "engine.threads": optional(COUNT),
    **dict.fromkeys(("diagnosis.samples", "diagnosis.trajectories"), COUNT),
}
PATHS = ("path", "data.path", "model.denoiser.path", "eval.clip.folder")
PLACES = ("outputs", "store", "checkpoints", "data", "inception")
PATH = Kind(
    "text, in quotes of its own where it looks like a number or a list", lambda value: isinstance(value, str | None)
)
KINDS |= dict.fromkeys(("name", *PATHS, *(f"paths.{name}" for name in PLACES)), PATH)
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
        if kind is PATH and str(value).startswith("~"):
            raise ValueError(f"{key} is {value}: ~ is not expanded here; write {Path(value).expanduser()}")
    check_bits(cfg)
    check_images(cfg)
    check_parts(cfg)
    if OmegaConf.is_missing(cfg, "path") and cfg.model.denoiser.path == "FOLDER":  # as model=diffusers has it
        raise ValueError("path has no value: give it the folder that pipeline.save_pretrained has written, path=...")
    if cfg.goal == "scores":
        real_images(cfg)
    if cfg.goal == EXPORT and cfg.engine is None:
        raise ValueError("goal=export needs an engine to export for: engine=openvino, onednn or torchao")
    hydra = HydraConfig.get()
    runtime = hydra.runtime
    check_folders(cfg, Path(runtime.output_dir), moves=bool(hydra.job.chdir))
    folders = [Path(source.path) / "method" for source in runtime.config_sources if source.schema == "file"]
    check_name(
        cfg.method.name, str(runtime.choices["method"]), {path.stem for d in folders for path in d.glob("*.yaml")}
    )


def real_images(cfg: DictConfig) -> DictConfig:
    """The choice of real images, which scores and training need; other goals do without.

    Raises:
        ValueError: something is missing to find them, or they would be read among what runs leave.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        if key.startswith("data."):
            raise ValueError(
                f"{key} has no value: give it one, {key}=...; goal=images scores nothing and needs no data"
            )
    check_images_apart(cfg, Path(HydraConfig.get().runtime.output_dir))
    return cfg.data


def check_bits(cfg: DictConfig) -> None:
    """Look at the bits, and at whether the name that results stand under says them.

    Raises:
        ValueError: bits that no grid has, no bits at all, or a name like w4a8 of other bits. What the command line changes
            stands in the rows of tables beside the name.
    """
    digits: list[str] = []
    for key, several in (("weight", ""), ("activation", ", a list of several")):
        value = cfg.quant[key]
        widths = list(value) if isinstance(value, ListConfig) and several else [value]
        unfit = [bits for bits in widths if not (whole(bits) and bits in BITS)]
        if value is not None and (unfit or not widths or len(set(widths)) < len(widths)):
            right = f"a whole number from {BITS[0]} to {BITS[-1]}{several}, or null (float)"
            raise ValueError(f"quant.{key} must be {right}, got {value!r}")
        digits.append(FLOAT_BITS if value is None else "".join(map(str, widths)))
    own, said = "w{}a{}".format(*digits), str(cfg.quant.name)
    changed = [
        text for text in HydraConfig.get().overrides.task if text.startswith(("quant.weight=", "quant.activation="))
    ]
    if re.fullmatch(r"w\d+a\d+", said) and own != said and not changed:
        raise ValueError(f"quant.name must be {own}, whose bits these are, got {said!r}: results would stand under it")


def check_images(cfg: DictConfig) -> None:
    """ValueError for so few images that they have no score."""
    images = OmegaConf.select(cfg, "model.protocol.images", default=FEWEST_SCORED)
    if cfg.goal == GOALS[-1] and images < FEWEST_SCORED:
        raise ValueError(
            f"model.protocol.images must be at least {FEWEST_SCORED} for scores, got {images}: goal=images makes them alone"
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
