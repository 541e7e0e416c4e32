"""Errors of a job that its configuration alone shows. Light to import: a typing error is reported before anything slow.

Objects check their own numbers. Here are those that no object has, that several share, or whose object is made late; and
folders that cannot be made, or hold one another: a store inside a run folder, results among images that are read.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tfmq_exp.cli.run_info import RunInfo
from tfmq_exp.cli.terminal import Terminal, say_error
from tfmq_exp.core import validate
from tfmq_exp.core.validate import Kind, number, one_of, optional, whole

GOALS = ("trajectory", "weights", "activations", "correction", "images", "scores")
DIAGNOSE, EXPORT, COMPARE = "diagnose", "export", "compare"  # branch off once there is the model; the last, its images
PROCESSES_PER_CORE = 4  # more only wait for one another and fill the memory
FEWEST_SCORED = 2  # images: one has no covariance
BITS, FLOAT_BITS = range(2, 9), "32"  # the latter in a name, for what stays float
RUN = "the run folder (hydra.run.dir, hydra.sweep.dir)"
MINUTES = Kind("a number from 0 to 525600, a year", lambda value: number(value) and 0 <= value <= 525600)
TEXT = Kind("a text", lambda value: isinstance(value, str))
PATH = Kind(
    "text, in quotes of its own where it looks like a number or a list", lambda value: isinstance(value, str | None)
)
# keys of `protocol`, which several objects share
COUNTS = (
    "sampling.num_inference_steps sampling.images calibration.images calibration.step_stride calibration.normal_samples "
    "diagnostics.images reconstruction.iterations reconstruction.batch_size scales.iterations scales.encoding_width "
    "correction.images qat.iterations qat.batch_size qat.calibration_batches"
)
RATES = (
    "reconstruction.learning_rate scales.learning_rate scales.joint_learning_rate qat.learning_rate qat.range_lr_scale"
)
# what the values of keys must be
KINDS: dict[Kind, str] = {
    one_of(*GOALS, COMPARE, DIAGNOSE, EXPORT): "until",
    one_of("memory", "stored"): "runtime.weights",
    validate.SEED: "seed",
    validate.SWITCH: "dry_run force runtime.estimate runtime.traceback eval.kid eval.precision_recall eval.cmmd model.denoiser.ema model.tie_qkv "
    "protocol.qat.horizontal_flip data.grey",
    validate.COUNT: "data.size eval.extract.batch_size eval.manifold_images model.denoiser.decode_rows model.denoiser.image_size runtime.batch_size runtime.processes runtime.microbatches "
    "diagnosis.samples diagnosis.trajectories comparison.floor_images " + re.sub(r"(\S+)", r"protocol.\1", COUNTS),
    optional(validate.COUNT): "runtime.threads engine.threads protocol.calibration.num_inference_steps",
    validate.ANY_COUNT: "protocol.qat.warmup",
    validate.RATE: re.sub(r"(\S+)", r"protocol.\1", RATES),
    validate.DECAY: "protocol.qat.ema_decay",
    validate.SHARE: "protocol.sampling.eta model.condition_dropout",
    validate.AMOUNT: "runtime.activation_cache_gib",
    optional(validate.AMOUNT): "model.sampling.guidance runtime.device_cache_gib",
    MINUTES: "runtime.checkpoint_every_min",
    optional(TEXT): "runtime.activation_cache_dir",
    PATH: "name path captions data.path data.listing model.denoiser.path model.denoiser.autoencoder paths.outputs paths.store paths.checkpoints paths.data "
    "paths.inception paths.alexnet paths.vgg",
}


def check(cfg: DictConfig, info: RunInfo) -> None:
    """Look at a job before it begins.

    Raises:
        ValueError: a value that cannot be right, by its key, with what would be; a method with another's name; an export without
            an engine; folders inside one another.
    """
    check_values(cfg, info.overrides)
    if cfg.until == "scores":
        images = OmegaConf.select(cfg, "protocol.sampling.images", default=FEWEST_SCORED)
        if images < FEWEST_SCORED:
            least = f"protocol.sampling.images must be at least {FEWEST_SCORED} for scores, got {images}"
            raise ValueError(f"{least}: until=images makes them alone")
        real_images(cfg, info.folder)
    if cfg.until == EXPORT and cfg.engine is None:
        raise ValueError("until=export needs an engine to export for: engine=openvino, onednn or torchao")
    check_folders(cfg, info.folder, moves=info.chdir)
    files = {path.stem for folder in info.config_folders for path in (folder / "method").glob("*.yaml")}
    check_name(cfg.method.name, info.choices["method"], files)


def check_values(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Look at the values of a configuration, which a run and the library have in common.

    Raises:
        ValueError: a value that cannot be right, by its key, with what would be.
    """
    for kind, keys in KINDS.items():
        for key in keys.split():
            value = OmegaConf.select(cfg, key, default=...)  # a model of one's own may do without some of them
            if value is not ... and not kind.fits(value):
                raise ValueError(f"{key} must be {kind.right}, got {value!r}")
            if kind is PATH and str(value).startswith("~"):
                raise ValueError(f"{key} is {value}: ~ is not expanded here; write {Path(value).expanduser()}")
    check_bits(cfg, overrides)
    processes, microbatches, cores = cfg.runtime.processes, cfg.runtime.microbatches, os.cpu_count() or 1
    if processes > (most := PROCESSES_PER_CORE * cores):
        each = f"{PROCESSES_PER_CORE} for each of the {cores} cores here"
        raise ValueError(f"runtime.processes must be at most {most}, {each}, got {processes}")
    if OmegaConf.select(cfg, "method.weights.protocol.precision") == "16-mixed" and processes > microbatches:
        raise ValueError(
            f"runtime.microbatches must be at least {processes}, the number of processes, got {microbatches}: at precision "
            "16-mixed every process needs a part of the batch"
        )
    calibration_steps(cfg)
    if OmegaConf.is_missing(cfg, "path") and cfg.model.denoiser.path == "FOLDER":  # as model=diffusers has it
        raise ValueError("path has no value: give it the folder that pipeline.save_pretrained has written, path=...")


def check_bits(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Look at the bits, and at whether the name of their configuration says them.

    Raises:
        ValueError: bits that no grid has, no bits at all, or a name like w4a8 of other bits, under which the results would be
            listed. Bits of the command line are listed beside the name.
    """
    digits: list[str] = []
    for key, several in (("weight", ""), ("activation", ", a list of several")):
        value = cfg.quant[key]
        widths = list(value) if isinstance(value, ListConfig) and several else [value]
        fit = all(whole(bits) and bits in BITS for bits in widths) and 0 < len(widths) == len(set(widths))
        if value is not None and not fit:
            right = f"a whole number from {BITS[0]} to {BITS[-1]}{several}, or null (float)"
            raise ValueError(f"quant.{key} must be {right}, got {value!r}")
        digits.append(FLOAT_BITS if value is None else "".join(map(str, widths)))
    right, name = "w{}a{}".format(*digits), str(cfg.quant.name)
    changed = any(text.startswith(("quant.weight=", "quant.activation=")) for text in overrides)
    if re.fullmatch(r"w\d+a\d+", name) and right != name and not changed:
        raise ValueError(
            f"quant.name must be {right}, whose bits these are, got {name!r}: results would stand under it"
        )


def calibration_steps(cfg: DictConfig) -> int | None:
    """Sampling steps of calibration, None if they are those of the images; ValueError where the images cannot use its table."""
    key, steps = "protocol.calibration.num_inference_steps", cfg.protocol.calibration.num_inference_steps
    if steps is None or steps == cfg.sampler.get("num_inference_steps"):
        return None
    outside = cfg.method.surgery.outside_timesteps
    if outside == "error":
        raise ValueError(f"{key}={steps} needs method.surgery.outside_timesteps=nearest, got {outside}")
    if cfg.engine is not None:
        raise ValueError(f"{key}={steps} needs engine=none: engines run the calibrated timesteps alone")
    if isinstance(cfg.quant.activation, ListConfig):
        raise ValueError(f"{key}={steps} needs one width of activations, got quant.activation={cfg.quant.activation}")
    return steps


def check_name(name: str, chosen: str, methods: set[str]) -> None:
    """Raise ValueError for a method whose name is that of another file of `methods`: its results would be listed as that one's."""
    if name != chosen and name in methods:
        raise ValueError(
            f"method={chosen} has method.name={name}, the name of another method, under which its results would stand: "
            f"write `name: {chosen}` below the defaults of method/{chosen}.yaml"
        )


def real_images(cfg: DictConfig, run: Path) -> DictConfig:
    """The choice of real images, which scores and training need; other goals do without.

    Raises:
        ValueError: something is missing to find them, or the folder, which is read at any depth, holds one that is written to.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        if key.startswith("data."):
            raise ValueError(
                f"{key} has no value: give it one, {key}=...; until=images scores nothing and needs no data"
            )
    if isinstance(images := OmegaConf.select(cfg, "data.path", default=None), str) and Path(images).is_dir():
        for name, folder in written_folders(cfg, run).items():
            if folder.is_relative_to(Path(images).resolve()):
                raise ValueError(
                    f"data.path={images} holds {name} ({folder}), whose pictures would be read as images: "
                    "choose a folder of images alone"
                )
    return cfg.data


def check_folders(cfg: DictConfig, run: Path, *, moves: bool) -> None:
    """Raise ValueError where folders that a job writes to hold each other, or where Hydra makes the run's the working directory."""
    if moves:
        raise ValueError(
            "hydra.job.chdir must be false: in another working directory relative paths (paths.outputs, paths.store, "
            "data.path, checkpoints) are other files, and no two runs share a store"
        )
    written = written_folders(cfg, run)
    for inner, outer in (("paths.store", RUN), (RUN, "paths.store"), ("paths.outputs", "paths.store")):
        if written[inner].is_relative_to(written[outer]):
            raise ValueError(
                f"{inner} ({written[inner]}) lies in {outer} ({written[outer]}): keep what runs leave and the store apart"
            )


def written_folders(cfg: DictConfig, run: Path) -> dict[str, Path]:
    """Folders that a job writes to, by key, links followed."""
    folders = {"paths.outputs": Path(cfg.paths.outputs), "paths.store": Path(cfg.paths.store), RUN: run}
    return {key: folder.resolve() for key, folder in folders.items()}


class FolderCheck(Callback):
    """Hydra callback: checks and makes the first folder before Hydra does.

    Raises:
        SystemExit: with status 1, after the error is printed.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        stop_without_folders(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        stop_without_folders(config, "hydra.sweep.dir")


def stop_without_folders(config: DictConfig, key_of_first: str) -> None:
    """End the command where a folder that it writes to, first that of Hydra's key, has no name, or cannot be made."""
    try:
        for key in ("name", "paths.outputs", "paths.store", key_of_first):
            check_references(config, key)
        if "/" in str(name := OmegaConf.select(config, "name")):
            raise ValueError(
                f"name={name}: a run's folder is called so, and a slash would put it elsewhere; leave it out"
            )
        for key in ("paths.outputs", "paths.store"):
            place = OmegaConf.select(config, key)
            if not isinstance(place, str) or not place.strip():  # which would be the root, or the working directory
                raise ValueError(f"{key} must be a folder, got {place!r}")
            if os.path.lexists(place) and not os.path.isdir(place):
                raise ValueError(f"{key}={place} is no folder, nor a link to one")
        first = str(OmegaConf.select(config, key_of_first))
        try:
            Path(first).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            folders = "paths.outputs, hydra.run.dir, hydra.sweep.dir"
            raise ValueError(f"{folders}: no folder {first}: {error.strerror}") from error
    except ValueError as error:
        say_error(Terminal(stderr=True), str(error))
        raise SystemExit(1) from None


def check_references(config: DictConfig, key: str) -> None:
    """Raise ValueError where a value refers to a key that is not there, as a file's name with `${` seems to."""
    try:
        OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}: {reason}; a $ of a name before a brace needs a backslash before it: \\${{") from error
