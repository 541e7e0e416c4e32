"""The library: load a denoiser, quantize it, sample, save, load again. `python run.py` makes its runs of the same parts."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jaxtyping import Float
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from tfmq_exp.cli.environment import pick_device, prepare
from tfmq_exp.cli.make_run import make_run
from tfmq_exp.cli.terminal import ProgressBars
from tfmq_exp.cli.validation import check_values
from tfmq_exp.core.files import write_atomically
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.pipeline import Pipeline
from tfmq_exp.pipeline.store import Store
from tfmq_exp.quant.timestep_context import OutsideTimesteps
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.surgery import components, serialization
from tfmq_exp.surgery.config import QuantizationConfig
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

CONF = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized network. Execution is simulated: weights are integers that are turned back into real numbers to compute with."""

    network: QuantizedNetwork
    recipe: Recipe | None  # how it is sampled; None for a sampler of one's own class, which no file describes

    def save(self, path: str | Path) -> int:
        """Write one safetensors file with integers packed to their bit-width; returns its size in bytes.

        Raises:
            FileNotFoundError: no such folder.
        """
        file = Path(path)
        if not file.parent.is_dir():
            raise FileNotFoundError(f"no folder {file.parent} for {file.name}")
        write_atomically(file, lambda partial: serialization.save(self.network, partial, self.recipe))
        return file.stat().st_size


def load_denoiser(model: str = "digits", *overrides: str) -> Denoiser:
    """Load a float model with its noise schedule, conditions and first stage.

    Args:
        model: a file of `conf/model`, as `digits` (shipped), `ldm_bedroom` or `diffusers`.
        overrides: of the configuration, as on the command line; `path=FOLDER` for `diffusers`. `quantize` takes the same.

    Raises:
        ValueError: a file that is missing or is no such model.
    """
    cfg = configuration(f"model={model}", *overrides)
    check_values(cfg, overrides)
    denoiser: Denoiser = instantiate(cfg.model.denoiser, _convert_="all")
    return denoiser


def quantize(
    denoiser: Denoiser,
    calibration: int | None = None,
    method: str = "tfmq",
    bits: str = "w4a8",
    *,
    config: QuantizationConfig | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    store: str | Path | None = None,
    progress: bool = True,
) -> QuantizedModel:
    """Quantize a denoiser with a method of `conf/method`. The same settings give the numbers of `python run.py`.

    Args:
        denoiser: of `load_denoiser`.
        calibration: number of the float model's trajectories that are learned from; None for that of the model's protocol.
        method: a file of `conf/method`.
        bits: a file of `conf/quant`, as `w4a8`; 32 for float activations.
        config: layers and operands that become integer, with their bits, in place of those of the method.
        overrides: of the configuration, as on the command line: `protocol.reconstruction.iterations=100`; those of
            `load_denoiser` again, which choose the sampler, too. Where an argument says otherwise, the override counts.
        seed: of calibration and learning.
        device: auto, cpu or cuda.
        store: folder that keeps finished stages, from which an interrupted call goes on; None for a temporary one.
        progress: show progress bars.

    Raises:
        ValueError: settings that cannot be.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"denoiser must be what load_denoiser returns, got {type(denoiser).__name__}")
    if denoiser.shards:
        raise ValueError("a denoiser whose weights stay in their files (runtime.weights=stored) is quantized by run.py")
    if isinstance(overrides, str):
        raise ValueError(f"overrides must be a list of texts, such as [{overrides!r}], got one text")
    choices = [f"model={denoiser.name}", f"method={method}", f"quant={bits}", f"seed={seed}", f"device={device}"]
    choices += [] if calibration is None else [f"protocol.calibration.images={calibration}"]
    cfg = configuration(*choices, *overrides)
    check_values(cfg, overrides)
    prepare(cfg.runtime.threads)
    run = make_run(cfg, pick_device(cfg.device), Path.cwd(), denoiser=denoiser)
    if run.method.correction.measures:
        raise ValueError(
            f"method {method} corrects its samples by statistics that no file of a network holds: use run.py, or "
            'overrides=("method/correction=none",)'
        )
    if run.first_stage or run.text_encoder:
        raise ValueError("a QuantizedModel is the denoiser alone: run.py quantizes first_stage and text_encoder, too")
    if config is not None:
        run = replace(run, method=replace(run.method, surgery=config))
    bars = ProgressBars(Console(quiet=not progress)).stage
    with tempfile.TemporaryDirectory() as temporary:
        experiment = Experiment(run, Pipeline(Store(Path(store or temporary)), bars, Logger()))
        network = experiment.activations.model
        return QuantizedModel(network, Recipe.of(run.calibration_sampling, denoiser))


def load_quantized(path: str | Path, outside_timesteps: OutsideTimesteps | None = None) -> QuantizedModel:
    """Load a file of `QuantizedModel.save`, or a run's `quantized.safetensors`; it needs no other file.

    Args:
        path: the file.
        outside_timesteps: what a timestep that was not calibrated does: `error`, or `nearest`, which reads the scales of the
            nearest one that was; None for the file's own choice.

    Raises:
        ValueError: not such a file, damaged, or of another version; an unknown choice.
    """
    network, recipe = serialization.load_with_recipe(Path(path))
    if outside_timesteps is not None:
        network.plan = replace(network.plan, outside_timesteps=outside_timesteps)
    return QuantizedModel(network, recipe)


def with_components(
    denoiser: Denoiser, first_stage: str | Path | None = None, text_encoders: Mapping[str, str | Path] | None = None
) -> Denoiser:
    """A denoiser that decodes and encodes with quantized components; what no file is given for stays as it is.

    Args:
        denoiser: of `load_denoiser`, whose components they were made of.
        first_stage: a run's `decoder.safetensors`; `first_stage.decode` of the result turns latents of `sample` into images.
        text_encoders: a run's files by the pipeline's names, `text_encoder`, `text_encoder_2`, ...; `encoder` of the result
            gives the conditions of `sample`.

    Raises:
        ValueError: a file that is damaged, of another network or of other settings; a name that the model does not have.
    """
    encoders = {name: Path(file) for name, file in (text_encoders or {}).items()}
    return components.with_components(denoiser, None if first_stage is None else Path(first_stage), encoders)


def sample(
    model: QuantizedModel,
    indices: Iterable[int] = range(16),
    seed: int = 0,
    *,
    num_inference_steps: int | None = None,
    **options: Any,
) -> Float[Tensor, "images channels height width"]:
    """Images around [-1, 1], not clamped (latents of a model with a first stage); image i has its own noise, whatever the others are.

    Args:
        model: of `quantize` or `load_quantized`.
        indices: of the images.
        seed: of their noise.
        num_inference_steps: of the sampler; None for those of the model's recipe. Others may visit timesteps outside the
            calibrated finite set: see `load_quantized`.
        options: of `Recipe.images`, as `conditions`.

    Raises:
        ValueError: a model without a recipe, or a timestep that the model refuses.
    """
    if model.recipe is None:
        raise ValueError("this model was sampled by a sampler class of one's own, which its file does not describe")
    recipe = model.recipe if num_inference_steps is None else model.recipe.with_steps(num_inference_steps)
    with torch.no_grad():
        return recipe.images(model.network, seed=seed, indices=list(indices), **options)


def configuration(*overrides: str) -> DictConfig:
    """The composed configuration of `python run.py OVERRIDES`.

    Raises:
        FileNotFoundError: a copy of the package without its `conf/` folder.
    """
    if not CONF.is_dir():
        raise FileNotFoundError(f"{CONF} is not there: install the project with `pip install -e` from its own folder")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))
