"""What a run is made of, how its stages are pulled through the store, and the first: trajectories of the float model."""

import logging
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tfmq_exp.calibration.collect import follow, ordered
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.cli.log_outputs import stage_summary
from tfmq_exp.core.distributed import ProcessGroup
from tfmq_exp.core.files import intact, write_checked
from tfmq_exp.core.finite import within
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.denoisers.temporal import measured_temporal_sites
from tfmq_exp.denoisers.unet import attentions, read_structure
from tfmq_exp.loggers.base import Logger
from tfmq_exp.methods.method import Method
from tfmq_exp.pipeline.progress import ProgressBars
from tfmq_exp.pipeline.store import Entry, Store
from tfmq_exp.reconstruction.loop import ComputeConfig
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.surgery.resolve import ResolvedConfig, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationPlan:
    """How many trajectories of the float model calibration sees, and how many run together."""

    images: int
    batch: int

    def __post_init__(self) -> None:
        check_fields(self, images=COUNT, batch=COUNT)

    def batches(self) -> list[range]:
        """Trajectories that run together."""
        return [range(start, min(start + self.batch, self.images)) for start in range(0, self.images, self.batch)]


@dataclass
class FloatStages:
    """Everything that a quantized network is made of, and what needs the float model alone."""

    denoiser: Denoiser
    sampling: Sampling
    method: Method
    calibration: CalibrationPlan
    batch: int  # images that go through the network together
    seed: int
    means: ComputeConfig
    store: Store
    bars: ProgressBars
    mirror: Logger
    hits: dict[str, dict[str, Any]] = field(default_factory=dict)
    shown_losses: set[str] = field(default_factory=set)  # curves that the mirror has seen grow
    pulled: set[Path] = field(default_factory=set)  # entries that are known to be finished
    inner_seconds: float = 0.0  # spent in the stages that the present one pulled

    @property
    def processes(self) -> ProcessGroup:
        """Who makes this run together."""
        return self.store.processes

    @cached_property
    def structure(self) -> UNetStructure:
        """The network's parts, with the temporal ones confirmed by measurement."""
        example, t = self.denoiser.example(), self.calls[-1]
        found = read_structure(self.denoiser.unet, example)
        other = t + 1 if t + 1 < int(self.denoiser.schedule["num_train_timesteps"]) else t - 1
        measured = measured_temporal_sites(self.denoiser.unet, example, t, other)
        if measured != set(found.temporal_sites):
            wrong = sorted(measured.symmetric_difference(found.temporal_sites))
            raise ValueError(
                f"by measurement {len(wrong)} layers of the network depend on t otherwise than their roles say, first {wrong[0]}: "
                "are its weights, or those before it, zeros?"
            )
        return found

    @cached_property
    def calls(self) -> tuple[int, ...]:
        """Timesteps at which the network is called for one image."""
        calls = self.sampling.calls(self.denoiser)
        log.info(
            "%s: %d network calls at %d timesteps, %d .. %d",
            self.sampling.sampler,
            len(calls),
            len(set(calls)),
            calls[0],
            calls[-1],
        )
        return calls

    @cached_property
    def plan(self) -> ResolvedConfig:
        """What is quantized, layer by layer."""
        names, timesteps = tuple(attentions(self.denoiser.unet)), self.sampling.finite_set(self.denoiser)
        return resolve(self.method.surgery, self.structure, names, self.method.scales, timesteps)

    @property
    def network_inputs(self) -> dict[str, Any]:
        """What identifies the float network."""
        return {"weights_sha256": self.denoiser.weights_sha256, "settings": dict(self.denoiser.settings)}

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        """What identifies the float model and the way it is sampled."""
        return {
            "model": self.denoiser.name,
            **self.network_inputs,
            "schedule": dict(self.denoiser.schedule),
            "sampling": self.sampling,
        }

    def pull(self, name: str, entry: Entry, compute: Callable[[Path], None]) -> Path:
        """Have the store hold the entry, and remember how that went.

        Seconds are the stage's own, without those that it pulls; `took` is what the entry took when it was made, also
        where this run only found it. A run looks at an entry once.
        """
        if entry.path in self.pulled:
            return entry.path
        outer, self.inner_seconds = self.inner_seconds, 0.0
        began = time.perf_counter()
        computed = self.store.pull(entry, compute, lambda: round(time.perf_counter() - began - self.inner_seconds, 2))
        seconds = time.perf_counter() - began
        own = round(seconds - self.inner_seconds, 2)
        self.inner_seconds = outer + seconds
        self.pulled.add(entry.path)
        self.remember(name, entry, own, computed=computed)
        return entry.path

    def have(self, name: str, entry: Entry, pull: Callable[[], object]) -> None:
        """Have the store hold a stage that the run stands on, though another one that it finds may have used it before.

        A finished one is not read: that takes long where it is large, and who reads it pulls it.
        """
        if not self.processes.broadcast(entry.whole):
            pull()
        elif entry.path not in self.pulled:
            self.remember(name, entry, 0.0, computed=False)

    def remember(self, name: str, entry: Entry, seconds: float, *, computed: bool) -> None:
        """Note a stage for the run's record, the first time that it is met."""
        if name in self.hits:
            return
        self.hits[name] = {
            "key": entry.key,
            "computed": computed,
            "seconds": seconds,
            "took": entry.took,
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "path": str(entry.path),
        }
        self.mirror.summary(stage_summary(name, self.hits[name]))
        log.info("%s %s (%s)", name, "computed" if computed else "found in the store", entry.key)

    @cached_property
    def trajectory(self) -> Entry:
        """Calibration data: depends on the float model, the sampler, how many images, and the seed."""
        return self.store.entry("trajectory", {**self.model_inputs, "calibration": self.calibration, "seed": self.seed})

    def calibration_set(self) -> CalibrationSet:
        """The calibration data, collected in one pass if the store has none."""

        def compute(folder: Path) -> None:
            parts, batches = folder / "parts", self.calibration.batches()
            files = {indices: parts / f"{indices.start:06d}.safetensors" for indices in batches}
            parts.mkdir(exist_ok=True)
            own = self.processes.shard(batches)
            with self.bars.stage("trajectory", len(own) * len(self.calls)) as advance:
                for i, indices in enumerate(own):
                    if intact(files[indices]):
                        continue
                    with within("calibration trajectories of the float network"):
                        part = follow(
                            self.denoiser,
                            self.sampling,
                            indices,
                            seed=self.seed,
                            each_step=lambda step, i=i: advance(i * len(self.calls) + step + 1, f"step {step + 1}"),
                        )
                    write_checked(files[indices], part.save)
            self.processes.barrier()
            if self.processes.is_main:
                whole = ordered([CalibrationSet.load(file) for file in files.values()])
                write_checked(folder / "calibration.safetensors", whole.save)
                shutil.rmtree(parts)

        return CalibrationSet.load(self.pull("trajectory", self.trajectory, compute) / "calibration.safetensors")
