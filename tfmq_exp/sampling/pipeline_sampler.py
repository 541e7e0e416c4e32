"""The sampler and the guidance of a pipeline of diffusers, as its own program sets them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.core.validate import COUNT
from tfmq_exp.denoisers.pipelines.load import example_calls, open_folder
from tfmq_exp.sampling.diffusers_scheduler import read_scheduler
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.trajectory import Sampler

THOUSANDTHS = NetworkConvention((("divide", 1000.0),))
# What pipelines make of their scheduler's timesteps.
CONVENTIONS = {
    **dict.fromkeys(("FluxPipeline", "Flux2KleinPipeline", "ChromaPipeline"), THOUSANDTHS),
    **dict.fromkeys(("QwenImagePipeline", "AuraFlowPipeline"), THOUSANDTHS),
    "Lumina2Pipeline": NetworkConvention((("divide", 1000.0), ("subtract_from", 1.0)), negated=True),
}


def read_pipeline_sampler(
    path: str | Path,
    num_inference_steps: int,
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
) -> Sampler:
    """The sampler of a pipeline's folder, its scheduler set as the pipeline sets it.

    Args:
        path: of the folder.
        num_inference_steps: of the pipeline's call.
        settings: others of the pipeline's call, on which timesteps may depend: height and width.
        checkpoint: of the denoiser, see `load_pipeline`.

    Raises:
        FileNotFoundError: a component lacks files.
        ValueError: a pipeline whose network is given other timesteps than are known here, or a scheduler that is not supported.
    """
    if not COUNT.fits(num_inference_steps):
        raise ValueError(f"num_inference_steps must be {COUNT.right}, got {num_inference_steps!r}")
    folder = open_folder(path, checkpoint)
    calls = example_calls(folder, {**(settings or {}), "num_inference_steps": num_inference_steps})
    arguments = {key: value for key, value in calls.set_timesteps.items() if key != "num_inference_steps"}
    if unknown := sorted(arguments.keys() - {"sigmas", "mu"}):
        raise ValueError(f"a {folder.name} sets its scheduler by {unknown[0]}, which is not supported")
    if not folder.scheduler().config.get("use_dynamic_shifting"):
        arguments.pop("mu", None)  # pipelines pass it to schedulers that do not use it, too
    sampler: Sampler = read_scheduler(str(path), num_inference_steps, **arguments)
    convention = CONVENTIONS.get(folder.name)
    if folder.name == "SanaPipeline":
        convention = NetworkConvention((("multiply", folder.outline("transformer").config["timestep_scale"]),))
    if convention:
        sampler = PipelineSampler(sampler, convention)
    found, recorded = sampler.calls({}), calls.timesteps[:: calls.guidance.calls]
    if found != recorded:
        differ = next(((a, b) for a, b in zip(found, recorded, strict=False) if a != b), (len(found), len(recorded)))
        raise ValueError(f"a {folder.name} gives its network the timesteps {differ[1]}, ... and not {differ[0]}, ...")
    return sampler


def read_pipeline_guidance(
    path: str | Path, settings: Mapping[str, Any] | None = None, checkpoint: str | Path | None = None
) -> float:
    """Scale of the classifier-free guidance of a pipeline's call, 1 for none, or where the network is given the scale itself."""
    folder, given = open_folder(path, checkpoint), settings or {}
    calls = example_calls(folder, given)
    if not calls.null:
        return 1.0
    if calls.guidance.weights is None:  # normalised afterwards: no sum tells the scale
        parameters = inspect.signature(folder.kind.__call__).parameters
        name = next(key for key in ("true_cfg_scale", "guidance_scale") if key in parameters)
        return float(given.get(name, parameters[name].default))
    sign = -1.0 if (calls.guidance.scale or 1.0) < 0 else 1.0  # of networks that predict the negative
    return sign * calls.guidance.weights[calls.guidance.order.index("given")]
