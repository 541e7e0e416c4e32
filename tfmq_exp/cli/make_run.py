"""The objects of a run, made from a composed configuration."""

import functools
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from tfmq_exp.calibration.dataset import CalibrationPlan
from tfmq_exp.cli.validation import calibration_steps, real_images
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.validate import WrongValueError
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.evaluation.image_comparison import ImageComparison
from tfmq_exp.evaluation.scores import Evaluator
from tfmq_exp.pipeline.run_config import DiagnosisPlan, FloorPlan, Run
from tfmq_exp.reconstruction.context import ComputeConfig, quiet_trainer
from tfmq_exp.sampling.conditioning import Captions
from tfmq_exp.sampling.diffusers_scheduler import replaced_settings
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan
from tfmq_exp.sampling.pipeline_sampler import read_pipeline_guidance
from tfmq_exp.sampling.prompt_sets import PromptSets

log = logging.getLogger(__name__)
make: Any = functools.partial(instantiate, _convert_="all")


def make_run(
    cfg: DictConfig,
    device: torch.device,
    folder: Path,
    group: ProcessGroup = ALONE,
    denoiser: Denoiser | None = None,
) -> Run:
    """Objects of a configuration.

    Args:
        cfg: composed configuration.
        device: of the networks.
        folder: of the run, in which real images are not looked for.
        group: processes of the run.
        denoiser: a loaded model to take in place of the configured one.

    Raises:
        ValueError: choices that do not fit together, or do not fit the model.
    """
    # first what is made in no time: a number that cannot be right is named before gigabytes are read
    sampling, method = make_sampling(cfg), make(cfg.method)
    components = {name: make(cfg[name]) for name in ("first_stage", "text_encoder")}
    method.correction.check(sampling.sampler)
    calibration = CalibrationPlan(cfg.protocol.calibration.images, cfg.runtime.batch_size, calibration_steps(cfg))
    if calibration.num_inference_steps and method.correction.measures:
        key = f"protocol.calibration.num_inference_steps={calibration.num_inference_steps}"
        raise ValueError(f"{key} needs method/correction=none: the noise is measured at the calibrated timesteps")
    if cfg.runtime.weights == "stored":
        check_stored(cfg)
    denoiser = denoiser or make(cfg.model.denoiser)
    assert denoiser is not None
    method.correction.check_training(denoiser.schedule)
    denoiser.to(device)
    sampling.check(denoiser)
    if steps := calibration.num_inference_steps:
        try:
            sampling.with_steps(steps).check(denoiser)
        except ValueError as error:
            raise ValueError(f"protocol.calibration.num_inference_steps={steps}: {error}") from error
    if left := replaced_settings(sampling.sampler, Path(cfg.model.denoiser.get("path") or "")):
        log.warning("%s", left)
    protocol, runtime = cfg.protocol, cfg.runtime
    cache_folder = None if runtime.activation_cache_dir is None else Path(runtime.activation_cache_dir)
    if cache_folder:
        cache_folder.mkdir(parents=True, exist_ok=True)
    evaluator = functools.cache(functools.partial(make, cfg.eval))  # its extractor serves both
    return Run(
        denoiser=denoiser,
        sampling=sampling,
        method=method,
        images=ImagePlan(protocol.sampling.images, cfg.seed, runtime.batch_size, protocol.sampling.uint8),
        calibration=calibration,
        diagnostics=protocol.diagnostics.images,
        diagnosis=diagnosis_plan(cfg),
        compute=ComputeConfig(
            runtime.batch_size,
            int(runtime.activation_cache_gib * 2**30) // group.world_size,
            quiet_trainer(device),
            cache_folder,
            group,
            timedelta(minutes=runtime.checkpoint_every_min),
            device,
            device_cache_bytes(runtime.device_cache_gib, device),
        ),
        seed=cfg.seed,
        floor=floor_plan(cfg),
        make_evaluator=evaluator,
        make_comparison=lambda: make_comparison(cfg, evaluator, device),
        make_training_images=lambda: make(real_images(cfg, folder)),
        **components,
    )


def check_stored(cfg: DictConfig) -> None:
    """ValueError for a model whose files cannot be read in parts, and for several processes."""
    if "weights" not in cfg.model.denoiser:
        raise ValueError(
            f"runtime.weights=stored needs model=pipeline, whose files are read in parts, got {cfg.model.name}"
        )
    if cfg.runtime.processes > 1:
        raise ValueError(f"runtime.weights=stored needs runtime.processes=1, got {cfg.runtime.processes}")


def device_cache_bytes(gib: float | None, device: torch.device) -> int:
    """Bytes of a CUDA device for cached activations, by default half of what is free there; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] // 2 if gib is None else int(gib * 2**30)


def diagnosis_plan(cfg: DictConfig) -> DiagnosisPlan:
    """Size of the diagnosis; ValueError, with its key, for a value that is none."""
    try:
        return DiagnosisPlan(**make(cfg.diagnosis))
    except WrongValueError as error:
        raise ValueError(error.under("diagnosis")) from error


def floor_plan(cfg: DictConfig) -> FloorPlan:
    """Float images that are made once more; ValueError, with its key, for a value that is none."""
    try:
        return FloorPlan(**make(cfg.comparison))
    except WrongValueError as error:
        raise ValueError(error.under("comparison")) from error


def make_comparison(cfg: DictConfig, evaluator: Callable[[], Evaluator], device: torch.device) -> ImageComparison:
    """Distances from the float images: scores also give their Fréchet distance, for which they have the extractor."""
    if cfg.until == "scores":
        found = evaluator()
        return ImageComparison(tuple(found.perceptual.values()), found.extract, str(device))
    return ImageComparison(tuple(make(cfg.eval.get("perceptual") or {}).values()), device=str(device))


def make_sampling(cfg: DictConfig) -> Sampling:
    """Sampler, guidance and conditions; captions of a file, or a set of prompts, replace the model's own conditions.

    `guidance: null` is that of a pipeline's own call.
    """
    replaced = {"conditioning"} if cfg.captions is not None or cfg.prompts is not None else set[str]()
    settings = make({key: value for key, value in cfg.model.sampling.items() if key not in replaced})
    call = cfg.model.get("call")
    if settings.get("guidance") is None and call is not None:
        settings["guidance"] = read_pipeline_guidance(cfg.model.denoiser.path, make(call), cfg.model.checkpoint)
    if cfg.captions is not None and cfg.prompts is not None:
        both = f"captions={cfg.captions} and prompts={cfg.prompts.name}"
        raise ValueError(f"{both} both say what images are of: give one")
    if cfg.captions is not None:
        settings["conditioning"] = Captions.read(str(cfg.captions))
    elif cfg.prompts is not None:
        settings["conditioning"] = PromptSets(make(cfg.prompts.images), make(cfg.prompts.calibration))
    return Sampling(make(cfg.sampler), **settings)
