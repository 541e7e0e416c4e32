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
from tfmq_exp.cli.environment import prepare
from tfmq_exp.cli.estimate import Counts, Estimate, format_bytes, format_duration, reckon, show
from tfmq_exp.cli.survey import Survey, still_to_do
from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.denoisers import compvis, first_stage, original
from tfmq_exp.denoisers.denoiser import ConditionEncoder, Conditions, Denoiser, NoConditions
from tfmq_exp.loggers.base import NullLogger
from tfmq_exp.pipeline.progress import ProgressBars
from tfmq_exp.pipeline.stages import Stages
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
        """Of one row."""
        return self([0])

    def to(self, device: torch.device) -> None:
        """Made on the CPU each time, it is on no device."""


def generic(network: nn.Module) -> nn.Module:
    """Without special values: what starts as zero or as the identity would hide what it multiplies."""
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
    unet = generic(compvis.openai_unet(arguments))
    scale = float(params.get("scale_factor", 1.0))
    autoencoder = first_stage.build(params["first_stage_config"], scale)
    generic(autoencoder)
    encoder: ConditionEncoder = NoConditions()
    if arguments.get("use_spatial_transformer"):
        encoder = RandomContext(1 if name == "ldm_imagenet" else 77, arguments["context_dim"])
    shape = original.square(params["channels"], params["image_size"])
    decoder = first_stage.LatentDecoder(autoencoder, scale)
    return Denoiser(name, unet, shape, original.schedule(config), "random", encoder, decoder)


def stages_of(args: argparse.Namespace, folder: str, *overrides: str) -> Stages:
    """All objects of a run."""
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
    return app.build_stages(cfg, torch.device("cpu"), ProgressBars(Console(quiet=True)), NullLogger())


@dataclass(frozen=True)
class Measured:
    """What a stage took: CPU seconds, and the most memory that the process has had so far."""

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
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def part_of(full: Counts, counts: Counts, small: Stages) -> Counts:
    """The counts of the fraction, with units whose costs were measured for the full recipe."""
    given = small.calibration.images, len(small.calls)
    phases: dict[str, Any] = {name: getattr(small.method, name) for name in counts.phases}
    seen = {name: counts.halves * phase.effort(*given).samples for name, phase in phases.items()}
    courses = {
        name: replace(course, recipe=phases[name].recipe, samples=seen[name], timesteps=counts.timesteps)
        for name, course in full.courses.items()
    }
    images = {name: count for name, count in counts.images.items() if name == "images"}
    return replace(counts, courses=courses, observed={name: seen[name] for name in full.observed}, images=images)


def run(stages: Stages, folder: Path, watch: Stopwatch) -> None:
    """The fraction of the recipe, from trajectories to images of the artefact.

    Raises:
        ValueError: the loaded model returns other numbers than the one in memory.
    """
    data: CalibrationSet = watch.of("trajectory", stages.calibration_set)
    model = watch.of("weights", stages.weighted_model)
    watch.of("activations", lambda: stages.learn("activations", stages.method.activations, model, 1, folder))
    model.tabulate_scales()
    path = folder / "quantized.safetensors"
    watch.of("saving", lambda: serialization.save(model, path))
    inputs = data[slice(0, 1)].inputs(torch.device("cpu"))

    def output(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(**inputs).sample

    wanted = output(model)
    network_bytes, denoiser = stages.float_bytes, stages.denoiser
    del model
    denoiser.unet.to("meta")  # no longer needed, and large
    loaded = watch.of("loading", lambda: serialization.load(path))
    if not torch.equal(output(loaded), wanted) or not wanted.isfinite().all():
        raise ValueError("the loaded model returns other numbers than the one in memory")
    size = path.stat().st_size
    Console().print(
        f"bit-equal after loading; {format_bytes(size)}, {size / network_bytes:.3f} of fp32", highlight=False
    )
    sampling, alone = stages.sampling, replace(denoiser, unet=loaded)
    predict = sampling.predictor(loaded)
    shard = range(stages.images.count)
    watch.of("images", lambda: sample_shard(predict, alone, sampling, stages.images, shard))


def report(whole: Estimate, part: Estimate, watch: Stopwatch, console: Console) -> dict[str, Any]:
    """Fraction and full recipe, stage by stage."""
    fractions = {stage.name: stage for stage in part.stages}
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
    show(whole, console)
    console.print(
        f"implied by the fraction: {format_duration(implied)}; estimate / implied: {whole.seconds / implied:.2f}",
        highlight=False,
    )
    at_peak = max(measured.peak for measured in watch.stages.values())
    console.print(
        f"fraction: {format_bytes(part.host)} of memory estimated, {format_bytes(at_peak)} measured", highlight=False
    )
    return {
        "stages": {name: vars(measured) for name, measured in watch.stages.items()},
        "estimated": {stage.name: stage.seconds for stage in part.stages},
        "full": {stage.name: stage.seconds for stage in whole.stages},
        "full_total": whole.seconds,
        "implied_total": implied,
        "memory": {"full": whole.host, "estimated": part.host, "measured": at_peak},
        "disk": whole.disk,
    }


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
        full = stages_of(args, folder)
        words = [f"model.protocol.{name}={value}" for name, value in protocol.items()]
        small = stages_of(args, folder, *words, f"runtime.batch={args.samples}")
        wanted, fraction = still_to_do(full, app.GOALS), still_to_do(small, PART)
        parameters = sum(p.numel() for p in full.denoiser.unet.parameters())
        console.print(f"{args.model}: {parameters:,} parameters, {format_bytes(peak())}", highlight=False)
        began = time.process_time()
        survey = Survey(full, time.process_time)
        counts = survey.completed(wanted)
        costs = survey.costs(counts)
        whole, part = reckon(costs, counts), reckon(costs, part_of(counts, fraction, small))
        console.print(
            f"the estimate itself took {time.process_time() - began:.1f} s, {format_bytes(peak())}", highlight=False
        )
        console.print(f"forward pass {costs.forward.seconds:.2f} s", highlight=False)
        del survey
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
