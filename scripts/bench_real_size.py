"""A network of real size through the whole pipeline on this machine, and what the estimate before a run says about it.

    python scripts/bench_real_size.py {ldm_bedroom|ldm_imagenet|sd_v1_4} [--iterations 1 --samples 2 ...] [overrides ...]

Builds the networks of conf/model/*.yaml with random weights (no checkpoint is needed), quantizes them with a fraction of the
recipe's samples, steps and iterations, saves the artefact, loads it alone, and checks that the loaded model returns the same
bits. Reports seconds and peak memory of every stage, what the estimate said for this fraction, the estimate for the full
recipe, and the ratio of that to what the measured fraction implies. Seconds are CPU seconds of one thread, which other
work on the machine hardly changes. The weight ranges' search is cut down (--candidates), in both numbers.
"""

import argparse
import functools
import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.cli import main as app
from tfmq_exp.cli.dry_run import Estimate, expected_cost, print_estimate
from tfmq_exp.cli.environment import prepare
from tfmq_exp.cli.terminal import ProgressBars, standard_streams
from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.denoisers.denoiser import ConditionEncoder, Conditions, Denoiser, NoConditions
from tfmq_exp.denoisers.loading import autoencoder, compvis_checkpoint, compvis_unet
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.learning import learning
from tfmq_exp.reconstruction.loop import ReconstructionContext
from tfmq_exp.sampling.images import sample_shard
from tfmq_exp.surgery import serialization

CONF = Path(__file__).parents[1] / "conf"
MODELS = ("ldm_bedroom", "ldm_imagenet", "sd_v1_4")
PART = ("trajectory", "weights", "activations", "images")


class RandomContext:
    """Any choice of a condition is some random sequence."""

    def __init__(self, tokens: int, width: int) -> None:
        self.shape = (tokens, width)

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Another sequence for each number of choices; the same one stands for no condition."""
        generator = torch.Generator().manual_seed(len(choices))
        given, null = (torch.randn(n, *self.shape, generator=generator) for n in (len(choices), 1))
        return Conditions({"encoder_hidden_states": given}, {"encoder_hidden_states": null})

    def example(self) -> Conditions:
        """Conditions of one row."""
        return self([0])

    def to(self, device: torch.device) -> None:
        """Made on the CPU each time, it is on no device."""


def generic(network: nn.Module) -> nn.Module:
    """Replace special values: parameters that start as zero or as the identity would hide what they multiply."""
    for parameter in network.requires_grad_(False).parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network.eval()


@functools.cache
def random_denoiser(name: str, architecture: str) -> Denoiser:
    """The networks of a model, weights from a seed. The hydra configuration calls this in place of the loader.

    Args:
        name: of the model.
        architecture: in the original program's layout, as JSON.
    """
    config = json.loads(architecture)
    params = config["model"]["params"]
    arguments = params["unet_config"]["params"]
    torch.manual_seed(0)
    unet = generic(compvis_unet.openai_unet(arguments))
    scale = float(params.get("scale_factor", 1.0))
    vae = autoencoder.build_autoencoder(params["first_stage_config"], scale)
    generic(vae)
    encoder: ConditionEncoder = NoConditions()
    if arguments.get("use_spatial_transformer"):
        encoder = RandomContext(1 if name == "ldm_imagenet" else 77, arguments["context_dim"])
    shape = compvis_checkpoint.sample_shape(config)
    decoder = autoencoder.LatentDecoder(vae, scale)
    return Denoiser(name, unet, shape, compvis_checkpoint.training_schedule(config), "random", encoder, decoder)


def experiment_of(args: argparse.Namespace, folder: str, *overrides: str) -> Experiment:
    """All stages of a run."""
    words = [f"model={args.model}", f"method={args.method}", f"quant={args.quant}", f"paths.outputs={folder}"]
    words += ["method.weight_observer.candidates=" + str(args.candidates)] if args.candidates else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: DictConfig = compose("config", [*words, *overrides, *args.overrides])
    with open_dict(cfg):
        architecture = json.dumps(OmegaConf.to_container(cfg.model.denoiser.config, resolve=True))
        cfg.model.denoiser = {
            "_target_": f"{__name__}.random_denoiser",
            "name": args.model,
            "architecture": architecture,
        }
        if cfg.model.sampling.guidance != 1:
            cfg.model.sampling.conditioning = {"_target_": "tfmq_exp.sampling.conditioning.Classes", "count": 1000}
    return app.make_experiment(cfg, torch.device("cpu"), ProgressBars(Console(quiet=True)).stage)


@dataclass(frozen=True)
class Measured:
    """Cost of a stage: CPU seconds, and the peak memory of the process up to its end, in bytes."""

    seconds: float
    peak: int


class Stopwatch:
    """Seconds and memory, stage by stage."""

    def __init__(self) -> None:
        self.stages: dict[str, Measured] = {}

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage."""
        began = time.process_time()
        result = work()
        self.stages[name] = Measured(time.process_time() - began, peak())
        Console().print(f"{name}: {self.stages[name].seconds:.1f} s, {format_bytes(peak())}", highlight=False)
        return result


def peak() -> int:
    """Peak memory of the process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(experiment: Experiment, folder: Path, watch: Stopwatch) -> None:
    """The fraction of the recipe, from trajectories to images of the artefact.

    Raises:
        ValueError: the loaded model returns other numbers than the one in memory.
    """
    config, pipeline = experiment.run, experiment.pipeline
    data: CalibrationSet = watch.of("trajectory", experiment.trajectory.samples)
    model = watch.of("weights", experiment.weights.model)

    def learn() -> None:
        with learning(pipeline, "activations", folder) as callbacks:
            network = model, config.denoiser.unet, config.structure
            config.method.activations(ReconstructionContext(*network, data, config.compute, 1, *callbacks))

    watch.of("activations", learn)
    model.tabulate_scales()
    path = folder / "quantized.safetensors"
    watch.of("saving", lambda: serialization.save(model, path))
    inputs = data[slice(0, 1)].inputs(torch.device("cpu"))

    def output(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(**inputs).sample

    expected = output(model)
    network_bytes, denoiser = config.float_bytes, config.denoiser
    del model
    denoiser.unet.to("meta")  # no longer needed, and large
    loaded = watch.of("loading", lambda: serialization.load(path))
    if not torch.equal(output(loaded), expected) or not expected.isfinite().all():
        raise ValueError("the loaded model returns other numbers than the one in memory")
    size = path.stat().st_size
    Console().print(
        f"bit-equal after loading; {format_bytes(size)}, {size / network_bytes:.3f} of fp32", highlight=False
    )
    sampling, alone = config.sampling, replace(denoiser, unet=loaded)
    predict = sampling.predictor(loaded)
    shard = range(config.images.count)
    watch.of("images", lambda: sample_shard(predict, alone, sampling, config.images, shard))


def report(whole: Estimate, part: Estimate, watch: Stopwatch, console: Console) -> dict[str, Any]:
    """Fraction and full recipe, stage by stage."""
    fractions = {stage.name: stage for stage in part.stages if stage.name in watch.stages}
    view = Table(title="CPU seconds of one thread", title_justify="left")
    for column in ("stage", "fraction: estimated", "measured", "ratio", "full recipe: estimated", "implied"):
        view.add_column(column, justify="left" if column == "stage" else "right")
    implied = 0.0
    ratios: dict[str, float] = {}
    for stage in whole.stages:
        like = (
            stage.name if stage.name in fractions else "images"
        )  # float images and diagnostics go with the quantized ones
        ratios[stage.name] = fractions[like].seconds / watch.stages[like].seconds
        implied += stage.seconds / ratios[stage.name]
        view.add_row(
            stage.name,
            *(
                (f"{fractions[like].seconds:.1f}", f"{watch.stages[like].seconds:.1f}")
                if like == stage.name
                else ("", "")
            ),
            f"{ratios[stage.name]:.2f}",
            format_duration(stage.seconds),
            format_duration(stage.seconds / ratios[stage.name]),
        )
    console.print(view)
    print_estimate(whole, console)
    console.print(
        f"implied by the fraction: {format_duration(implied)}; estimate / implied: {whole.seconds / implied:.2f}",
        highlight=False,
    )
    at_peak = max(measured.peak for measured in watch.stages.values())
    console.print(
        f"fraction: {format_bytes(peak_of(part))} of memory estimated, {format_bytes(at_peak)} measured",
        highlight=False,
    )
    return {
        "stages": {name: vars(measured) for name, measured in watch.stages.items()},
        "estimated": {stage.name: stage.seconds for stage in part.stages},
        "full": {stage.name: stage.seconds for stage in whole.stages},
        "full_total": whole.seconds,
        "implied_total": implied,
        "memory": {"full": peak_of(whole), "estimated": peak_of(part), "measured": at_peak},
        "disk": sum(stage.disk for stage in whole.stages),
    }


def peak_of(estimate: Estimate) -> int:
    """Estimated bytes at the peak."""
    return round(max(map(estimate.memory, estimate.stages)))


def main() -> int:
    """Measure, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--method", default="tfmq")
    parser.add_argument("--quant", default="w4a8")
    parser.add_argument("--iterations", type=int, default=1, help="per unit")
    parser.add_argument("--samples", type=int, default=1, help="trajectories, and images that are sampled")
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    parser.add_argument("--batch", type=int, default=1, help="samples of an iteration")
    parser.add_argument("--candidates", type=int, default=4, help="of a weight's range; 0 for the method's own")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("overrides", nargs="*", help="of run.py, for the fraction and for the full recipe")
    args = parser.parse_intermixed_args()
    console = Console()
    prepare(1)
    logging.disable(logging.WARNING)
    protocol = {
        "steps": args.steps,
        "images": args.samples,
        "calibration_images": args.samples,
        "calibration_every": 1,
        "iterations": args.iterations,
        "scale_iterations": args.iterations,
        "recon_batch": args.batch,
    }
    with tempfile.TemporaryDirectory() as folder:
        full = experiment_of(args, folder)
        words = [f"protocol.{name}={value}" for name, value in protocol.items()]
        small = experiment_of(args, folder, *words, f"runtime.batch_size={args.samples}")
        parameters = sum(p.numel() for p in full.run.denoiser.unet.parameters())
        console.print(f"{args.model}: {parameters:,} parameters, {format_bytes(peak())}", highlight=False)
        began = time.process_time()
        whole = expected_cost(full, app.GOALS[:-1])
        spent = time.process_time() - began
        console.print(f"the estimate itself took {spent:.1f} s, {format_bytes(peak())}", highlight=False)
        part = expected_cost(small, PART)
        assert whole is not None
        assert part is not None
        watch = Stopwatch()
        run(small, Path(folder), watch)
    found = report(whole, part, watch, console)
    if args.json:
        args.json.write_text(
            json.dumps({"model": args.model, "parameters": parameters, **found}, indent=2) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
