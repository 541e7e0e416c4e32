"""Duration of a step of quantization-aware training, method by method.

    python scripts/bench_qat.py [--methods lsq,lsq_tdq,...] [--steps 15] [overrides of run.py ...]

Every method takes one step in turn, so that other load of the machine affects all alike; medians are compared. `float` is the
same network with its quantizers switched off, so `fake quantization` is what a step takes beyond it. `generators` is the share
of a step with networks of the timestep that the same form takes less with static ranges. Only checkpoints, the progress bar
and the loading of batches are left out. The quantizers start as in a run; nothing is written but the training images.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tfmq_exp.cli import main as app
from tfmq_exp.cli.environment import pick_device, prepare
from tfmq_exp.cli.terminal import ProgressBars, standard_streams
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.stages.weights import TrainWeights
from tfmq_exp.pipeline.unit_checkpoints import FileUnitCheckpointer, LoggingCallback
from tfmq_exp.qat.module import QuantizationAwareTraining
from tfmq_exp.qat.train import prepare_training
from tfmq_exp.quant.quantizers import Mode

CONF = Path(__file__).resolve().parents[1] / "conf"
METHODS = "lsq,lsq_tdq,pact,pact_tdq,nipq,nipq_tdq,qil,qil_tdq,duq,duq_tdq,lsq_dynamic,dynamic_generator,dynamic_generator_time"
FLOAT = "float"


class Steps:
    """A method's training outside of Lightning: one step at a time, always on the same batch."""

    def __init__(self, method: str, folder: str, overrides: list[str]) -> None:
        words = [f"method={method}", f"paths.outputs={folder}", *overrides]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", words)
        prepare(cfg.runtime.threads)
        device = pick_device(cfg.device)
        weights = app.make_experiment(cfg, device, ProgressBars(Console(quiet=True)).stage).weights
        assert isinstance(weights, TrainWeights)
        callback = LoggingCallback(lambda _done, _note: None, Logger(), "weights")
        task = weights.task(Path(folder), FileUnitCheckpointer(Path(folder) / "units", {}), callback)
        self.module, batches = prepare_training(task, weights.method.protocol)
        self.batch = batches.batch(0).on(device)
        self.optimizer: Any = self.module.configure_optimizers()["optimizer"]
        self.module.train()
        self.module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]

    def __call__(self) -> float:
        """Take a step and return its seconds."""
        began = now(self.module)
        self.module.iterate(self.optimizer, self.batch)
        return now(self.module) - began


def now(module: QuantizationAwareTraining) -> float:
    """Synchronize the device and return the time in seconds."""
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def switched_off(steps: Steps) -> Steps:
    """The float network's own training."""
    model = steps.module.model
    for quantizer in (*model.weight_quantizers(), *model.activation_quantizers().values()):
        quantizer.mode = Mode.OFF
    model.generators = None
    return steps


def medians(steps: dict[str, Callable[[], float]], count: int, each_step: Callable[[], None]) -> dict[str, float]:
    """Median seconds of a step, after one that is not counted; `each_step` is called after each."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + count):
        for name, step in steps.items():
            found[name].append(step())
            each_step()
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--steps", type=int, default=15)
    args, overrides = parser.parse_known_args()
    names = args.methods.split(",")
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bars:
        made = bars.add_task("networks", total=1 + len(names))
        steps: dict[str, Callable[[], float]] = {}
        for name in (FLOAT, *names):
            own = Steps(names[0] if name == FLOAT else name, folder, overrides)
            steps[name] = switched_off(own) if name == FLOAT else own
            bars.advance(made)
        done = bars.add_task("steps", total=(1 + args.steps) * len(steps))
        seconds = medians(steps, args.steps, lambda: bars.advance(done))
    table = Table(title=f"medians of {args.steps} interleaved steps", title_justify="left")
    for column in ("method", "step, ms", "of lsq", "fake quantization", "generators"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, taken in seconds.items():
        static = seconds.get(name.removesuffix("_tdq"))
        generators = f"{1 - static / taken:.0%}" if name.endswith("_tdq") and static else ""
        ratio = f"{taken / seconds['lsq']:.2f}" if "lsq" in seconds else ""
        table.add_row(name, f"{1000 * taken:.0f}", ratio, f"{1 - seconds[FLOAT] / taken:.0%}", generators)
    Console().print(table)
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
