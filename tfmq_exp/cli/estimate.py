"""Cost of a run before it starts: a few passes and iterations are measured and multiplied by their number.

Seconds are right within about a third; bytes are the measured peak of a batch, the networks, and what calibration caches.
"""

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.peak_memory import PeakMemory
from tfmq_exp.denoisers.denoiser import first_argument
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.timestep_context import exact_timesteps
from tfmq_exp.reconstruction.capture import sample_bytes
from tfmq_exp.reconstruction.unit_learning import is_learnable
from tfmq_exp.sampling.trajectory import timestep_rows
from tfmq_exp.surgery.quantized_network import build_quantized_network

BUDGET = 0.5  # seconds of a measured pass or iteration; with fewer rows if it would take longer
WARM_UP = 10.0  # seconds of a first pass, above which it counts as it is
GRADIENT_ROWS = 4  # that gradients are measured with
CODE_BYTES = 0.25  # of an integer weight, over those of the float32 weight that is kept with it
TRAINING_COPIES = 5  # of what is trained: average, Adam's two moments, gradients, and these as one vector
# ends of the names of stages that take no time
NOT_ESTIMATED = ("first_stage", "text_encoders")  # stages of components, whose passes are not those of the denoiser
QUICK = ("scores", "comparison", "reference", "examples", "rounding", "features")


class StageEstimate(NamedTuple):
    """Cost of one stage. Bytes: on the device that computes (networks, one batch), in the host's memory, on disk."""

    name: str
    seconds: float
    device: float
    host: float = 0
    disk: float = 0


def estimate(run: Any, missing: Mapping[str, int | None], engine: str = "") -> list[StageEstimate]:
    """Estimate the stages of a `Run` that are not in the store, but for those that take no time, or are `NOT_ESTIMATED`.

    `missing` has the count of each as `Stage.count` has it; `engine` is the name of its export.
    """
    left_out = (*QUICK, *NOT_ESTIMATED)
    if not (missing := {name: count for name, count in missing.items() if not name.endswith(left_out)}):
        return []
    with torch.random.fork_rng():  # what is measured must not change what is drawn later
        costs = Costs(run)
        return [costs.stage(name, count, engine) for name, count in missing.items()]


class Cost(NamedTuple):
    """Seconds and peak bytes of some rows that are computed together."""

    seconds: float
    bytes: float


def measure(work: Callable[[int], object], rows: int, most: int | None = None) -> Cost:
    """Cost of `work(rows)`; where that is slow or more than `most`, extrapolated from as many rows as the budget allows."""

    def once(count: int) -> Cost:
        timer = timeit.Timer(lambda: work(count), timer=now)
        with PeakMemory() as memory:  # which also warms up: a network's first pass may take seconds longer
            seconds = timer.timeit(1)
        return Cost(min(timer.repeat(2, 1)) if seconds < WARM_UP else seconds, memory.bytes)

    one = once(1)
    few = min(rows, most or rows, int(BUDGET / max(one.seconds, 1e-9)))
    if few <= 1:
        return Cost(rows * one.seconds, rows * one.bytes)
    return Cost(*(b + max(0.0, b - a) * (rows - few) / (few - 1) for a, b in zip(one, once(few), strict=True)))


def now() -> float:
    """Synchronize the accelerator, if there is one, and return the time in seconds."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Costs:
    """Measured costs of a run's network. Its quantized copy has scales of 1 wherever calibration would put others."""

    def __init__(self, run: Any) -> None:
        self.run, self.network, self.batch = run, run.denoiser.network, run.compute.batch
        self.network_bytes = sum(p.nbytes for p in self.network.parameters())  # bytes
        self.quantized = self.network_bytes * (1 + CODE_BYTES)
        self.float_network = self.network_bytes * (
            run.denoiser.device.type != "cpu"
        )  # elsewhere it is part of the process
        self.conditions = run.sampling.conditions(run.denoiser, run.seed, "estimate", range(1))
        self.sample, self.rows_per_image = self.noise(1).nbytes, 2 if run.sampling.guided else 1
        self.model = build_quantized_network(self.network, run.resolved, MinMax())
        self.set_activations(Mode.QUANTIZE)
        decode = run.denoiser.first_stage.decode
        with torch.no_grad():
            self.call, self.quantized_call = self.prediction(self.network), self.prediction(self.model)
            self.decoding = measure(lambda rows: decode(self.noise(rows)), self.batch)
            self.image = decode(self.noise(1)).numel()

    def noise(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.run.denoiser.sample_shape, device=self.run.denoiser.device)

    def data(self, rows: int) -> CalibrationSet:
        """Stand-in for the calibration set: rows from all sampling steps."""
        timesteps, zeros = exact_timesteps(self.run.resolved.timesteps), torch.zeros(rows, dtype=torch.long)
        step = torch.arange(rows) * len(timesteps) // rows
        conditions = {name: value.cpu() for name, value in self.conditions.given.items()}
        rest = zeros, conditions, zeros, self.conditions.constants, first_argument(self.network)
        return CalibrationSet(self.noise(rows).cpu(), timesteps[step], step, *rest)

    def forward(self, rows: int) -> Tensor:
        return self.model(**self.data(rows).inputs(self.run.denoiser.device)).sample

    def set_activations(self, mode: Mode) -> None:
        """Set all activation quantizers, also those without data, which the model's own method refuses."""
        for quantizer in self.model.activation_quantizers().values():
            quantizer.mode = mode
            for value in quantizer.scale_provider.state_dict().values():
                value.nan_to_num_(1.0)

    def prediction(self, network: nn.Module) -> Cost:
        """Cost of the noise prediction for a batch of images, guidance included."""
        predict, t = self.run.sampling.predictor(network), self.run.calls[len(self.run.calls) // 2]

        def work(images: int) -> Tensor:
            given = {name: value.expand(images, *value.shape[1:]) for name, value in self.conditions.given.items()}
            at = timestep_rows(t, images, self.run.denoiser.device)
            return predict(self.noise(images), at, replace(self.conditions, given=given))

        return measure(work, self.batch)

    def stage(self, name: str, count: int | None, engine: str) -> StageEstimate:
        """Cost of a stage: images times passes of the two networks, but for what learns."""
        if name in ("weights", "activations"):
            return self.phase(name, count or 0)
        run, steps = self.run, len(self.run.calls)
        images, floats, passes, decoded, host, disk = count or 1, 0, 1, 0, 0, 0
        if name in ("trajectory", "latents"):
            images, floats, passes = run.calibration.images, len(run.calibration_calls), 0
            kept = floats if name == "trajectory" else 1
            disk = images * kept * self.rows_per_image * self.sample
            host = 3 * disk
        elif name == "correction":
            images, floats = run.method.correction.images, steps
            passes = len(set(run.calls)) * (len(self.model.activation_bits()) or 1)
        elif name.endswith("images"):
            images, decoded = run.images.count if count is None else count, 1
            floats, passes = (steps, 0) if name.startswith("float ") else (0, steps)
            disk = images * self.image
        elif name.endswith("diagnostics"):  # the quantized network on its own trajectory and on the float one
            floats, passes = steps, 2 * steps
        elif name == engine:
            images, disk = self.batch, self.network_bytes
        parts = (floats, self.call), (passes, self.quantized_call), (decoded, self.decoding)
        seconds = images / self.batch * sum(times * cost.seconds for times, cost in parts)
        peak = max(cost.bytes for times, cost in parts if times) + self.quantized * (passes > 0)
        return StageEstimate(name, seconds, peak + self.float_network, host, disk)

    def phase(self, name: str, finished: int) -> StageEstimate:
        """Cost of weights or activations: weight ranges, observed activation ranges, and what learns."""
        phase, budget = getattr(self.run.method, name), (self.run.calibration.images, len(self.run.calibration_calls))
        recipe, protocol = getattr(phase, "recipe", None), getattr(phase, "protocol", None)
        observe = phase if hasattr(phase, "ranges") else getattr(phase, "observe", None)
        searches = 0 if name == "activations" or protocol else 2 if "activations" in phase.learns else 1
        seconds, peak, cached, samples = searches * self.weight_ranges(), self.call.bytes, 0.0, 0
        if protocol:
            for quantizer in self.model.weight_quantizers():
                quantizer.mode = Mode.QUANTIZE
            weights = [p for p in self.model.parameters() if p.is_floating_point()]
            iteration = self.iteration(-(-protocol.batch // protocol.parts), weights)
            seconds = protocol.parts * (protocol.iterations - finished) * iteration.seconds
            peak = iteration.bytes + TRAINING_COPIES * sum(p.nbytes for p in weights)
        if observe and any(
            quantizer.scale_provider.needs_data for quantizer in self.model.activation_quantizers().values()
        ):
            self.set_activations(Mode.OBSERVE)
            samples = self.rows_per_image * observe.budget(*budget).samples
            with torch.no_grad():
                seconds += samples * measure(self.forward, observe.batch).seconds / observe.batch
        if recipe:
            self.set_activations(Mode.QUANTIZE if recipe.scales else Mode.OFF)
            samples = self.rows_per_image * phase.budget(*budget).samples
            learning, peak, cached = self.learning(name, phase, samples, finished)
            seconds += learning
        on_device = min(cached, self.run.compute.device_cache_bytes)
        kept = min(cached - on_device, self.run.compute.cache_bytes)
        disk = self.network_bytes * CODE_BYTES + cached - on_device - kept
        peak += self.quantized + self.float_network + on_device
        return StageEstimate(name, seconds, peak, 2 * samples * self.sample + kept, disk)

    def weight_ranges(self) -> float:
        """Seconds of the range search for all weights, from some channels of the largest."""
        specs = {name: layer.weight for name, layer in self.run.resolved.layers.items() if layer.weight}
        if not (sizes := {name: self.run.structure.layers[name].weights for name in specs}):
            return 0.0
        weight = self.network.get_submodule(largest := max(sizes, key=sizes.__getitem__)).get_parameter("weight")
        cost = measure(lambda rows: self.run.method.weight_observer(weight[:rows], specs[largest]), len(weight))
        return cost.seconds / weight.numel() * sum(sizes.values())

    def iteration(self, rows: int, learned: Sequence[Tensor]) -> Cost:
        """Cost of a pass with gradients; measured with few rows, as more might not fit into a GPU that learns by units."""

        @torch.enable_grad()
        def step(count: int) -> Any:
            return torch.autograd.grad(self.forward(count).square().mean(), learned, allow_unused=True)

        for parameter in learned:
            parameter.requires_grad_(True)
        return measure(step, rows, GRADIENT_ROWS)

    def learning(self, name: str, phase: Any, samples: int, finished: int) -> tuple[float, float, float]:
        """Seconds, peak bytes and cached bytes of units that learn: each is its share of the network's iteration."""
        recipe, run, layers = phase.recipe, self.run, self.run.structure.layers
        learnable = frozenset(self.model.weight_layers() if name == "weights" else run.resolved.layers)
        units = [u for u in phase.partition(run.structure, learnable) if is_learnable(self.model, u, recipe)][finished:]
        macs = {name: layer.macs for name, layer in layers.items()}
        shares = [sum(macs[layer] for layer in unit.layers) / sum(macs.values()) for unit in units]
        # scales learn like biases: from the gradients of all outputs, but of no weight
        learned = [p for p in self.model.network.parameters() if recipe.rounding or p.dim() == 1]
        cost = self.iteration(min(recipe.batch, samples), learned)
        given = self.network, [unit for unit in units if unit.driver == "denoiser"], self.data(2)
        outputs, both = (sample_bytes(*given, with_inputs=own, form=recipe.cache).values() for own in (False, True))
        # over all samples: again for each unit, as far as what units return is not kept; for GPTQ, to each layer of a unit
        kept = run.compute.cache_bytes / max(samples * sum(outputs), 1) if recipe.cache == "float32" else 0.0
        passes = 3 + len(units) * max(0.0, 1 - kept)
        passes += sum(share * len(unit.layers) / 2 for share, unit in zip(shares, units, strict=True) if recipe.gptq)
        row = self.quantized_call.seconds / self.batch / self.rows_per_image
        seconds = recipe.iterations * cost.seconds * sum(shares) + passes * samples * row
        seconds *= 1 if recipe.rounding else len(self.model.activation_bits()) or 1
        return seconds, cost.bytes * max(shares, default=0), samples * max(both, default=0)
