"""A network of real size through the whole pipeline on this machine, and what the estimate before a run says about it.

    python scripts/bench_real_size.py {ldm_bedroom|ldm_imagenet|sd_v1_4} [--iterations 1 --samples 2 ...] [overrides ...]

Builds the networks of conf/model/*.yaml with random weights (no checkpoint is needed), quantizes them with a fraction of the
recipe's samples, steps and iterations, saves the artefact, loads it alone, and checks that the loaded model returns the same
bits. Reports seconds and peak memory of every stage, what the estimate said for this fraction, the estimate for the full recipe, and
its ratio to what the measured fraction implies. Seconds are CPU seconds of one thread, which other work on the machine hardly
changes. The weight ranges' search is cut down (--candidates), in both numbers.
"""

import argparse
import json
import logging
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from random_denoiser import random_denoiser
from rich.console import Console
from rich.table import Table

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.cli import main as app
from tfmq_exp.cli.dry_run import Estimate, expected_cost, print_estimate
from tfmq_exp.cli.environment import prepare
from tfmq_exp.cli.terminal import ProgressBars, standard_streams
from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.unit_checkpoints import learning
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.sampling.images import sample_shard
from tfmq_exp.surgery import serialization

CONF = Path(__file__).parents[1] / "conf"
MODELS = ("ldm_bedroom", "ldm_imagenet", "sd_v1_4")
PART = ("trajectory", "weights", "activations", "images")
COUNTS = {"iterations": (1, "per unit"), "samples": (1, "trajectories, and images"), "steps": (2, "of the sampler")}
COUNTS["batch"] = (1, "samples of an iteration")
FRACTION = (
    "protocol.sampling={{num_inference_steps: {steps}, images: {samples}}}",
    "protocol.calibration={{images: {samples}, step_stride: 1}}",
    "protocol.reconstruction={{iterations: {iterations}, batch_size: {batch}}}",
    "protocol.scales.iterations={iterations}",
    "runtime.batch_size={samples}",
)


def experiment_of(args: argparse.Namespace, folder: str, *overrides: str) -> Experiment:
    """All stages of a run."""
    words = [f"model={args.model}", f"method={args.method}", f"quant={args.quant}", f"paths.outputs={folder}"]
    words += [f"method.weight_observer.candidates={args.candidates}"] if args.candidates else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: DictConfig = compose("config", [*words, *overrides, *args.overrides])
    with open_dict(cfg):
        architecture = json.dumps(OmegaConf.to_container(cfg.model.denoiser.config, resolve=True))
        target = f"{random_denoiser.__module__}.{random_denoiser.__name__}"
        cfg.model.denoiser = {"_target_": target, "name": args.model, "architecture": architecture}
        if cfg.model.sampling.guidance != 1:
            cfg.model.sampling.conditioning = {"_target_": "tfmq_exp.sampling.conditioning.Classes", "count": 1000}
    return app.make_experiment(cfg, torch.device("cpu"), ProgressBars(Console(quiet=True)).stage)


class Measured(NamedTuple):
    """Cost of a stage: CPU seconds, and the peak memory of the process up to its end, in bytes."""

    seconds: float
    peak: int


class Stopwatch(dict[str, Measured]):
    """Seconds and memory, stage by stage."""

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage."""
        began = time.process_time()
        result = work()
        self[name] = Measured(time.process_time() - began, peak())
        Console().print(f"{name}: {self[name].seconds:.1f} s, {format_bytes(peak())}", highlight=False)
        return result


def peak() -> int:
    """Peak memory of the process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(experiment: Experiment, folder: Path, watch: Stopwatch) -> None:
    """The fraction of the recipe, from trajectories to images; ValueError if the loaded model returns other numbers."""
    config, pipeline = experiment.run, experiment.pipeline
    data: CalibrationSet = watch.of("trajectory", experiment.trajectory.samples)
    model = watch.of("weights", experiment.weights.model)

    def learn() -> None:
        network = model, config.denoiser.network, config.structure
        with learning(pipeline, "activations", folder) as callbacks:
            config.method.activations(ReconstructionContext(*network, data, config.compute, 1, *callbacks))

    watch.of("activations", learn)
    model.tabulate_scales()
    path = folder / "quantized.safetensors"
    watch.of("saving", lambda: serialization.save(model, path))
    inputs = data[slice(0, 1)].inputs(torch.device("cpu"))
    with torch.no_grad():
        expected = model(**inputs).sample
    network_bytes = config.float_bytes
    del model
    config.denoiser.network.to("meta")  # no longer needed, and large
    loaded = watch.of("loading", lambda: serialization.load(path))
    with torch.no_grad():
        same = torch.equal(loaded(**inputs).sample, expected)
    if not same or not expected.isfinite().all():
        raise ValueError("the loaded model returns other numbers than the one in memory")
    size = f"{format_bytes(path.stat().st_size)}, {path.stat().st_size / network_bytes:.3f} of fp32"
    Console().print(f"bit-equal after loading; {size}", highlight=False)
    alone, predict = replace(config.denoiser, network=loaded), config.sampling.predictor(loaded)
    shard = range(config.images.count)
    watch.of("images", lambda: sample_shard(predict, alone, config.sampling, config.images, shard))


def report(whole: Estimate, part: Estimate, watch: Stopwatch, console: Console) -> dict[str, Any]:
    """Fraction and full recipe, stage by stage."""
    fractions = {stage.name: stage for stage in part.stages if stage.name in watch}
    view = Table(title="CPU seconds of one thread", title_justify="left")
    for column in ("stage", "fraction: estimated", "measured", "ratio", "full recipe: estimated", "implied"):
        view.add_column(column, justify="left" if column == "stage" else "right")
    implied = 0.0
    for stage in whole.stages:
        # float images and diagnostics go with the quantized ones
        like = stage.name if stage.name in fractions else "images"
        both = fractions[like].seconds, watch[like].seconds
        ratio = both[0] / both[1]
        implied += stage.seconds / ratio
        own = [f"{seconds:.1f}" for seconds in both] if like == stage.name else ["", ""]
        durations = format_duration(stage.seconds), format_duration(stage.seconds / ratio)
        view.add_row(stage.name, *own, f"{ratio:.2f}", *durations)
    console.print(view)
    print_estimate(whole, console)
    full, estimated = (round(max(map(one.memory, one.stages))) for one in (whole, part))
    at_peak = max(measured.peak for measured in watch.values())
    for line in (
        f"implied by the fraction: {format_duration(implied)}; estimate / implied: {whole.seconds / implied:.2f}",
        f"fraction: {format_bytes(estimated)} of memory estimated, {format_bytes(at_peak)} measured",
    ):
        console.print(line, highlight=False)
    return {
        "stages": {name: measured._asdict() for name, measured in watch.items()},
        "estimated": {stage.name: stage.seconds for stage in part.stages},
        "full": {stage.name: stage.seconds for stage in whole.stages},
        "full_total": whole.seconds,
        "implied_total": implied,
        "memory": {"full": full, "estimated": estimated, "measured": at_peak},
        "disk": sum(stage.disk for stage in whole.stages),
    }


def main() -> None:
    """Measure, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--method", default="tfmq")
    parser.add_argument("--quant", default="w4a8")
    for name, (default, what) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--candidates", type=int, default=4, help="of a weight's range; 0 for the method's own")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("overrides", nargs="*", help="of run.py, for the fraction and for the full recipe")
    args = parser.parse_intermixed_args()
    console = Console()
    prepare(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        full = experiment_of(args, folder)
        small = experiment_of(args, folder, *(word.format(**vars(args)) for word in FRACTION))
        parameters = sum(p.numel() for p in full.run.denoiser.network.parameters())
        console.print(f"{args.model}: {parameters:,} parameters, {format_bytes(peak())}", highlight=False)
        watch = Stopwatch()
        whole = watch.of("the estimate itself", lambda: expected_cost(full, app.GOALS[:-1]))
        part = expected_cost(small, PART)
        assert whole is not None
        assert part is not None
        run(small, Path(folder), watch)
    found = report(whole, part, watch, console)
    if args.json:
        text = json.dumps({"model": args.model, "parameters": parameters, **found}, indent=2)
        args.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    with standard_streams():
        main()
