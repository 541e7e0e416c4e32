"""From the float network to the finished method: trajectory, weights, activations, correction, pulled through the store.

Each method here says in its first lines what the stage depends on; that is its key.
"""

import json
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.calibration.collect import collect
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.temporal import measured_temporal_sites
from tfmq_exp.denoisers.unet import anatomy, attentions
from tfmq_exp.experiment.keeping import UnitFiles, UnitProgress, load_learned, save_learned
from tfmq_exp.experiment.progress import Bars
from tfmq_exp.experiment.store import Entry, Store, write_atomically, write_json
from tfmq_exp.experiment.tracking import Mirror
from tfmq_exp.methods.correction import NoiseStatistics
from tfmq_exp.methods.method import Method
from tfmq_exp.reconstruction.report import Learned
from tfmq_exp.reconstruction.run import Means, Task
from tfmq_exp.sampling.sampler import Predict
from tfmq_exp.sampling.sampling import Sampling
from tfmq_exp.sampling.seeds import derive_seed
from tfmq_exp.surgery import artifact
from tfmq_exp.surgery.plan import ResolvedPlan
from tfmq_exp.surgery.quantized_unet import QuantizedUNet, build

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationPlan:
    """How many trajectories of the float model calibration sees, and how many run together."""

    images: int
    batch: int

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch < 1:
            raise ValueError(f"calibration images and batch must be at least 1, got {self.images} and {self.batch}")


@dataclass
class NetworkStages:
    """Everything that a quantized network is made of, and the stages that make it."""

    denoiser: Denoiser
    sampling: Sampling
    method: Method
    calibration: CalibrationPlan
    batch: int  # images that go through the network together
    seed: int
    means: Means
    store: Store
    bars: Bars
    mirror: Mirror
    hits: dict[str, dict[str, Any]] = field(default_factory=dict)
    inner_seconds: float = 0.0  # spent in the stages that the present one pulled

    @cached_property
    def anatomy(self) -> Anatomy:
        """The network's parts, with the temporal ones confirmed by measurement."""
        example = self.denoiser.example()
        found = anatomy(self.denoiser.unet, example)
        measured = measured_temporal_sites(self.denoiser.unet, example, self.calls[-1], self.calls[-1] + 1)
        if measured != set(found.temporal_sites):
            wrong = sorted(measured.symmetric_difference(found.temporal_sites))
            raise ValueError(f"by measurement these layers' dependence on t is not what their roles say: {wrong}")
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
    def plan(self) -> ResolvedPlan:
        """What is quantized, layer by layer."""
        names, timesteps = tuple(attentions(self.denoiser.unet)), self.sampling.finite_set(self.denoiser)
        return self.method.surgery.resolve(self.anatomy, names, self.method.scales, timesteps)

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
        where this run only found it.
        """
        outer, self.inner_seconds = self.inner_seconds, 0.0
        began = time.perf_counter()
        computed = self.store.pull(entry, compute)
        seconds = time.perf_counter() - began
        own = round(seconds - self.inner_seconds, 2)
        if computed:
            entry.note_time(own)
        hit = {
            "key": entry.key,
            "computed": computed,
            "seconds": own,
            "took": entry.took,
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "path": str(entry.path),
        }
        self.inner_seconds = outer + seconds
        if name not in self.hits:
            self.hits[name] = hit
            log.info("%s %s (%s)", name, "computed" if computed else "found in the store", entry.key)
        return entry.path

    # trajectory --------------------------------------------------------------------------------------------------

    @cached_property
    def trajectory(self) -> Entry:
        """Calibration data: depends on the float model, the sampler, how many images, and the seed."""
        return self.store.entry("trajectory", {**self.model_inputs, "calibration": self.calibration, "seed": self.seed})

    def calibration_set(self) -> CalibrationSet:
        """The calibration data, collected in one pass if the store has none."""

        def compute(folder: Path) -> None:
            batches = -(-self.calibration.images // self.calibration.batch)
            with self.bars.stage("trajectory", batches * len(self.calls)) as advance:
                done = iter(range(1, batches * len(self.calls) + 1))
                data = collect(
                    self.denoiser,
                    self.sampling,
                    images=self.calibration.images,
                    seed=self.seed,
                    batch=self.calibration.batch,
                    each_step=lambda step: advance(next(done), f"step {step + 1}"),
                )
            write_atomically(folder / "calibration.safetensors", data.save)

        return CalibrationSet.load(self.pull("trajectory", self.trajectory, compute) / "calibration.safetensors")

    # weights -----------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Entry:
        """Integer weights: depend on data only where the method learns, on activations only where it learns both."""
        method, lines = self.method, self.plan.sites.items()
        inputs: dict[str, Any] = {
            **self.network_inputs,
            "specs": {name: line.weight for name, line in lines if line.weight},
            "splits": {name: line.split for name, line in lines if line.weight and line.split},
            "range": method.weight_range,
            "weights": method.weights,
        }
        if method.weights.learns:
            inputs |= {"trajectory": self.trajectory.key, "seed": self.seed}
        if "activations" in method.weights.learns:
            inputs |= self.activation_inputs
        return self.store.entry("weights", inputs)

    def weighted_model(self) -> QuantizedUNet:
        """The model with integer weights; activations are still float, or learned already if that was done jointly."""
        model = build(self.denoiser.unet, self.plan, self.method.weight_range)

        def compute(folder: Path) -> None:
            keeper = self.learn("weights", self.method.weights, model, self.seed, folder)
            state = model.activation_state() if "activations" in self.method.weights.learns else {}
            save_learned(folder / "weights.safetensors", Learned(model.integers, state), {})
            write_json(folder / "units.json", keeper.reports())

        learned, _ = load_learned(self.pull("weights", self.weights, compute) / "weights.safetensors")
        for site, weight in learned.integers.items():
            if site not in model.integers:
                model.freeze(site, weight)
        model.load_activations(learned.activations)
        return model

    def learn(self, name: str, phase: Callable[..., None], model: QuantizedUNet, seed: int, folder: Path) -> UnitFiles:
        """Run a method's phase under a progress bar, with every finished unit kept in the folder."""
        keeper, data = UnitFiles(folder / "units"), self.calibration_set()
        with self.bars.stage(name, 1) as advance:
            watcher = UnitProgress(advance, self.mirror, name)
            phase(Task(model, self.denoiser.unet, self.anatomy, data, self.means, seed, keeper, watcher))
        return keeper

    def unit_reports(self) -> list[dict[str, Any]]:
        """What learning each unit did, phase by phase; empty for methods that learn nothing."""
        rows: list[dict[str, Any]] = []
        for phase, entry in (("weights", self.weights), ("activations", self.activations)):
            path = entry.path / "units.json"
            rows += [{"phase": phase, **row} for row in json.loads(path.read_text())] if path.is_file() else []
        return rows

    # activations -------------------------------------------------------------------------------------------------

    @property
    def activation_inputs(self) -> dict[str, Any]:
        """Where activations are quantized and how."""
        return {
            "inputs": {name: line.input for name, line in self.plan.sites.items()},
            "outputs": {name: line.output for name, line in self.plan.sites.items()},
            "splits": {name: line.split for name, line in self.plan.sites.items()},
            "operands": self.plan.operands,
            "tied": self.plan.tied,
        }

    @cached_property
    def activations(self) -> Entry:
        """The finished quantized model: depends on weights, data, and everything about activations."""
        inputs = {
            "weights": self.weights.key,
            "trajectory": self.trajectory.key,
            **self.activation_inputs,
            "activations": self.method.activations,
            "temporal": self.method.temporal,
            "seed": self.seed,
        }
        return self.store.entry("activations", inputs)

    @cached_property
    def quantized_model(self) -> QuantizedUNet:
        """The finished model, loaded from its artefact."""

        def compute(folder: Path) -> None:
            model = self.weighted_model()
            keeper = self.learn(
                "activations", self.method.activations, model, derive_seed(self.seed, "activations"), folder
            )
            self.method.temporal(model, self.denoiser.unet, self.anatomy)
            model.merge_sources()
            write_atomically(folder / "quantized.safetensors", lambda path: artifact.save(model, path))
            write_json(folder / "units.json", keeper.reports())

        path = self.pull("activations", self.activations, compute) / "quantized.safetensors"
        return artifact.load(path).to(next(self.denoiser.unet.parameters()).device)

    # correction --------------------------------------------------------------------------------------------------

    @cached_property
    def correction(self) -> Entry | None:
        """Statistics of the quantization noise, for methods that correct it."""
        if not self.method.correction.measures:
            return None
        inputs = {
            **self.model_inputs,
            "activations": self.activations.key,
            "correction": self.method.correction,
            "seed": self.seed,
        }
        return self.store.entry("correction", inputs)

    @cached_property
    def statistics(self) -> NoiseStatistics | None:
        """The same, measured if the store has none."""
        correction: Any = self.method.correction
        if self.correction is None:
            return None

        def compute(folder: Path) -> None:
            batch = self.batch
            with self.bars.stage("correction", -(-correction.images // batch) * len(self.calls)) as advance:
                statistics = correction.measure(
                    self.quantized_model,
                    self.denoiser,
                    self.sampling,
                    seed=self.seed,
                    batch=batch,
                    each_step=lambda done: advance(done, ""),
                )
            write_atomically(folder / "statistics.safetensors", lambda path: save_file(statistics.tensors(), path))

        return NoiseStatistics.of(
            load_file(self.pull("correction", self.correction, compute) / "statistics.safetensors")
        )

    @cached_property
    def corrected(self) -> tuple[Predict, Sampling]:
        """What the finished method samples with: the quantized network's prediction and the sampling, both corrected."""
        model, statistics = self.quantized_model, self.statistics
        if statistics is not None and statistics.bits:
            model.use_bits(statistics.bits)
        elif widths := model.activation_bits():
            log.warning("nothing chooses between %s activation bits: %d at every step", widths, widths[-1])
        correction: Any = self.method.correction
        return correction(self.sampling.predictor(model), self.sampling, statistics)

    @property
    def finished(self) -> Entry:
        """The last entry that says what is sampled with."""
        return self.correction or self.activations
