"""Cost of a run before it starts: a few passes and iterations are measured and multiplied by their number.

Seconds are right within about a third; bytes are the measured peak of a batch, the networks, and what calibration caches.
"""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.cli.environment import busy
from tfmq_exp.cli.measure import BUDGET, Cost, measure, measure_units, now
from tfmq_exp.cli.terminal import say
from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.reconstruction.capture import sample_bytes
from tfmq_exp.reconstruction.loop import is_learnable
from tfmq_exp.surgery.build import build_quantized_unet

CODE_BYTES = 0.25  # of an integer weight, over those of the float32 weight that is kept with it
TRAINING_COPIES = 5  # of what is trained: average, Adam's two moments, gradients, and these as one vector


class StageEstimate(NamedTuple):
    """Cost of one stage. Bytes: on the device that computes (networks, one batch), in the host's memory, on disk."""

    name: str
    seconds: float
    device: float
    host: float = 0
    disk: float = 0


@dataclass(frozen=True)
class Estimate:
    """Cost of a run, stage by stage, on top of the bytes `process` that are allocated already."""

    stages: Sequence[StageEstimate]
    process: int
    accelerated: bool = False
    note: str = ""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def memory(self, stage: StageEstimate) -> float:
        """Peak bytes of a stage: of the accelerator, or of the host where there is none."""
        return stage.device if self.accelerated else self.process + stage.device + stage.host

    def __str__(self) -> str:
        peak, disk = max(map(self.memory, self.stages)), sum(stage.disk for stage in self.stages)
        host = self.process + max(stage.host for stage in self.stages) if self.accelerated else peak
        on_device = f"{format_bytes(peak)} on the GPU, " if self.accelerated else ""
        rest = f"{format_bytes(host)} of memory, {format_bytes(disk)} on disk"
        return f"{format_duration(self.seconds)}, {on_device}{rest}"


def print_estimate(estimate: Estimate, console: Console, processes: int = 1) -> None:
    """Print totals and a table of the stages. Scoring, loading and saving are not included."""
    say(console, f"estimate: {estimate}")
    table = Table()
    for name in ("stage", "time", "share", "GPU memory" if estimate.accelerated else "memory"):
        table.add_column(name, justify="left" if name == "stage" else "right", overflow="fold")
    for stage in estimate.stages:
        share = f"{stage.seconds / max(estimate.seconds, 1e-9):.0%}"
        table.add_row(stage.name, format_duration(stage.seconds), share, format_bytes(estimate.memory(stage)))
    console.print(table)
    for line in (estimate.note, busy(), f"  by one process; {processes} share it" if processes > 1 else ""):
        if line:
            say(console, line)


def estimate(run: Any, missing: Mapping[str, int | None], engine: str = "") -> Estimate | None:
    """Estimate the stages that are not in the store; None if none of them takes long.

    Args:
        run: the experiment; its denoiser, sampling, method, structure, resolved configuration, calls, images, calibration, compute and seed count.
        missing: name of each stage to be made -> images that are left, trajectories (diagnostics), network passes of one image
            (diagnoses), units or iterations of training that an interrupted attempt has finished (weights, activations).
        engine: name of the engine that executes the finished model too; the names of its stages begin with it.
    """
    quick = ("scores", "reference", "examples", "rounding", "features")
    if not (missing := {name: count for name, count in missing.items() if not name.endswith(quick)}):
        return None
    accelerated = run.denoiser.device.type != "cpu"
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.random.fork_rng():  # what is measured must not change what is drawn later
        costs = Costs(run)
        stages = [costs.stage(name, count, engine) for name, count in missing.items()]
    stages = [stage._replace(device=stage.device + costs.network * accelerated) for stage in stages]
    note = ""
    if engine and any(name.startswith(engine) for name in missing):
        note = f"{engine}: its sampling is counted at the speed of the simulated network{' on the GPU' * accelerated}; "
        note += "its export as a pass of one batch, though building and compiling a graph takes longer"
    return Estimate(stages, process, accelerated, note)


class Costs:
    """Measured costs of a run's network. Its quantized copy has scales of 1 wherever calibration would put others."""

    def __init__(self, run: Any) -> None:
        self.run, self.method, self.plan, self.compute = run, run.method, run.resolved, run.compute
        self.denoiser, self.unet, self.batch = run.denoiser, run.denoiser.unet, run.compute.batch
        self.network = sum(p.nbytes for p in self.unet.parameters())  # bytes
        self.quantized = self.network * (1 + CODE_BYTES)
        self.sample, self.rows_per_image = self.noise(1).nbytes, 2 if run.sampling.guided else 1
        self.conditions = run.sampling.conditions(run.denoiser, run.seed, "estimate", range(1))
        self.model = build_quantized_unet(self.unet, self.plan, MinMax())
        self.set_activations(Mode.QUANTIZE)
        with torch.no_grad():
            self.call, self.quantized_call = self.prediction(self.unet), self.prediction(self.model)
            self.decoding = measure(lambda rows: self.denoiser.first_stage.decode(self.noise(rows)), self.batch)
            self.image = self.denoiser.first_stage.decode(self.noise(1)).numel()

    def noise(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.denoiser.sample_shape, device=self.denoiser.device)

    def data(self, rows: int) -> CalibrationSet:
        """Stand-in for the calibration set: rows from all sampling steps."""
        timesteps, zeros = torch.tensor(self.plan.timesteps), torch.zeros(rows, dtype=torch.long)
        step = torch.arange(rows) * len(timesteps) // rows
        conditions = {name: value.cpu() for name, value in self.conditions.given.items()}
        return CalibrationSet(self.noise(rows).cpu(), timesteps[step], step, zeros, conditions, zeros)

    def forward(self, rows: int) -> Tensor:
        return self.model(**self.data(rows).inputs(self.denoiser.device)).sample

    def set_activations(self, mode: Mode) -> None:
        """Set all activation quantizers, also those without data, which the model's own method refuses."""
        for quantizer in self.model.activation_quantizers().values():
            quantizer.mode = mode
            for value in quantizer.source.state_dict().values():
                value.nan_to_num_(1.0)

    def prediction(self, network: nn.Module) -> Cost:
        """Cost of the noise prediction for a batch of images, guidance included."""
        predict, t = self.run.sampling.predictor(network), self.run.calls[len(self.run.calls) // 2]

        def work(images: int) -> Tensor:
            given = {name: value.expand(images, *value.shape[1:]) for name, value in self.conditions.given.items()}
            at = torch.full((images,), t, device=self.denoiser.device)
            return predict(self.noise(images), at, Conditions(given, self.conditions.null))

        return measure(work, self.batch)

    def stage(self, name: str, count: int | None, engine: str) -> StageEstimate:
        run, calls = self.run, len(self.run.calls)
        one, memory = self.quantized_call.seconds / self.batch, self.quantized + self.quantized_call.bytes
        trajectory = calls * self.call.seconds / self.batch  # of the float network, for one image
        if name == "trajectory":
            size = (states := run.calibration.images * len(run.calibration_calls)) * self.rows_per_image * self.sample
            return StageEstimate(name, states * self.call.seconds / self.batch, self.call.bytes, 3 * size, size)
        if name in ("weights", "activations"):
            return self.phase(name, count or 0)
        if name == "correction":
            passes = len(set(run.calls)) * (len(self.model.activation_bits()) or 1)
            return StageEstimate(name, self.method.correction.images * (trajectory + passes * one), memory)
        if name.endswith("images"):
            count, is_float = run.images.count if count is None else count, name == "float images"
            seconds = count * ((trajectory if is_float else calls * one) + self.decoding.seconds / self.batch)
            peak = max(self.call.bytes if is_float else memory, self.decoding.bytes)
            return StageEstimate(name, seconds, peak, disk=count * self.image)
        if name.endswith("diagnostics"):  # the quantized network on its own trajectory and on the float one
            one = 2 * calls * one + trajectory
        count, disk = (self.batch, self.network) if name == engine else (count or 1, 0)
        return StageEstimate(name, count * one, memory, disk=disk)

    def phase(self, name: str, finished: int) -> StageEstimate:
        """Cost of weights or activations: weight ranges, observed activation ranges, and what learns."""
        phase, budget = getattr(self.method, name), (self.run.calibration.images, len(self.run.calibration_calls))
        recipe, protocol = getattr(phase, "recipe", None), getattr(phase, "protocol", None)
        observe = phase if hasattr(phase, "ranges") else getattr(phase, "observe", None)
        searches = 0 if name == "activations" or protocol else 2 if "activations" in phase.learns else 1
        seconds, peak, cached, samples = searches * self.weight_ranges(), self.call.bytes, 0.0, 0
        if protocol:
            seconds, peak = self.training(protocol, finished)
        if observe and any(quantizer.source.needs_data for quantizer in self.model.activation_quantizers().values()):
            self.set_activations(Mode.OBSERVE)
            samples = self.rows_per_image * observe.budget(*budget).samples
            with torch.no_grad():
                seconds += samples * measure(self.forward, observe.batch).seconds / observe.batch
        if recipe:
            self.set_activations(Mode.QUANTIZE if recipe.scales else Mode.OFF)
            samples = self.rows_per_image * phase.budget(*budget).samples
            learning, peak, cached = self.learning(name, phase, samples, finished)
            seconds += learning
        kept, disk = min(cached, self.compute.cache_bytes), self.network * CODE_BYTES
        return StageEstimate(
            name, seconds, self.quantized + peak, 2 * samples * self.sample + kept, disk + cached - kept
        )

    def weight_ranges(self) -> float:
        """Seconds of the range search for all weights, from some channels of the largest."""
        specs = {name: layer.weight for name, layer in self.plan.sites.items() if layer.weight}
        sizes = {name: self.run.structure.sites[name].weights for name in specs}
        if not sizes:
            return 0.0
        spec = specs[largest := max(sizes, key=sizes.__getitem__)]
        weight = self.unet.get_submodule(largest).get_parameter("weight")
        part = weight if spec.axis is None else weight[: max(1, 2**18 // weight[0].numel())]
        began = now()
        self.method.weight_observer(part, spec)
        return (now() - began) / part.numel() * sum(sizes.values())

    def training(self, protocol: Any, finished: int) -> tuple[float, float]:
        """Seconds and peak bytes of training the whole network, from the gradients of a few rows."""
        for quantizer in self.model.weight_quantizers():
            quantizer.mode = Mode.QUANTIZE
        weights = [p.requires_grad_(True) for p in self.model.parameters() if p.is_floating_point()]

        def step(rows: int) -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(self.forward(rows).square().mean(), weights, allow_unused=True)

        cost = measure(step, -(-protocol.batch // protocol.parts))
        steps = protocol.parts * (protocol.iterations - finished)
        return steps * cost.seconds, cost.bytes + TRAINING_COPIES * sum(p.nbytes for p in weights)

    def learning(self, name: str, phase: Any, samples: int, finished: int) -> tuple[float, float, float]:
        """Seconds, peak bytes and cached bytes of units that learn: one of each kind is measured, by the learning loop itself."""
        recipe, structure = phase.recipe, self.run.structure
        learnable = frozenset(self.model.weight_layers() if name == "weights" else self.plan.sites)
        units = [unit for unit in phase.partition(structure, learnable) if is_learnable(self.model, unit, recipe)][
            finished:
        ]
        macs = {unit.name: sum(structure.sites[layer].macs for layer in unit.sites) for unit in units}
        largest = {unit.kind: unit for unit in sorted(units, key=lambda unit: macs[unit.name])}
        rows = min(recipe.batch, samples)
        data = self.data(max(2, min(rows, int(BUDGET * self.batch / self.call.seconds))))
        context = (self.model, self.unet, structure, data, self.compute, self.run.seed)
        costs = measure_units(context, list(largest.values()), recipe, rows)
        like = {unit.name: largest[unit.kind].name for unit in units}
        iteration = sum(costs[like[name]].seconds * macs[name] / macs[like[name]] for name in like)
        driven = [unit for unit in units if unit.driver == "denoiser"]
        cached = samples * sum(sample_bytes(self.unet, driven, data, with_inputs=False).values())
        # of all samples through the networks: again for each unit, as far as the cache cannot keep what units return
        passes = 3 + len(units) * max(0.0, 1 - self.compute.cache_bytes / max(cached, 1))
        row = self.quantized_call.seconds / self.batch / self.rows_per_image
        rounds = 1 if recipe.rounding else len(self.model.activation_bits()) or 1
        seconds = rounds * (recipe.iterations * iteration + passes * samples * row)
        return seconds, max((cost.bytes for cost in costs.values()), default=0), cached
