"""Time, memory and disk that a run will take: what was measured of one pass, one iteration and one image, times how many."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.measure import Pass, UnitCost
from tfmq_exp.cli.terminal import say
from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.reconstruction.activation_cache import RandomBatches
from tfmq_exp.reconstruction.capture import groups_within
from tfmq_exp.reconstruction.loop import ERROR_SAMPLES
from tfmq_exp.reconstruction.module import ReconstructionConfig

INTEGER_SHARE = 0.25  # of float32: integers are kept as bytes beside the real numbers that they stand for


@dataclass(frozen=True)
class Course:
    """A phase that learns: which units, from how many samples, and how often all of it is repeated.

    Args:
        units: with what their learning costs.
        recipe: iterations, batch, and which networks' inputs are captured.
        samples: calibration samples that it sees.
        timesteps: rows of a unit that is driven by timesteps.
        rounds: once for each activation width.
        quantizing: whether activations are quantized meanwhile.
        importance: seconds per sample of finding the objective's weights.
        setup: seconds of every unit beside its iterations.
    """

    units: tuple[UnitCost, ...]
    recipe: ReconstructionConfig
    samples: int
    timesteps: int
    rounds: int = 1
    quantizing: bool = False
    importance: float = 0.0
    setup: float = 0.0

    def rows(self, unit: UnitCost) -> int:
        """Rows that a unit learns from."""
        return self.samples if unit.driver == "denoiser" else self.timesteps

    def batch(self, unit: UnitCost) -> int:
        """Rows of one iteration."""
        return min(self.recipe.batch, self.rows(unit))

    @property
    def driven(self) -> list[UnitCost]:
        """Units whose inputs and outputs are captured while the denoiser runs."""
        return [unit for unit in self.units if unit.driver == "denoiser"]

    def groups(self, cache: int) -> list[list[UnitCost]]:
        """Units that one pass of the float network serves."""
        units = {unit.name: unit for unit in self.driven}
        with_inputs = "float" in self.recipe.inputs.origins
        sizes = {name: self.samples * (u.returned + with_inputs * u.fed) for name, u in units.items()}
        return [[units[name] for name in group] for group in groups_within(sizes, cache // 2)]

    def capturing(self, cache: int, slower: float) -> float:
        """Seconds of all passes that find the units' inputs and outputs; finished units are replayed from the cache."""
        groups = self.groups(cache)
        seconds = sum(self.samples * (max(u.span.end for u in group) + self.importance) for group in groups)
        kept: list[UnitCost] = []
        for unit in self.driven if "quantized" in self.recipe.inputs.origins else ():
            seconds += slower * self.samples * (unit.span.start - sum(u.span.seconds for u in kept))
            kept.append(unit)
            while kept and sum(u.returned for u in kept) * self.samples > cache // 4:
                kept.pop(0)
        return seconds

    def judging(self, slower: float) -> float:
        """Seconds of running the units by themselves before and after they learn."""
        seconds = 0.0
        for unit in self.units:
            rows = self.rows(unit)
            judged = -(-rows // max(1, rows // ERROR_SAMPLES))
            again = "quantized" in self.recipe.inputs.origins and unit.driver == "denoiser"
            seconds += slower * unit.span.seconds * (judged + (rows if again else judged))
        return seconds

    def learning(self) -> float:
        """Seconds of all iterations."""
        return self.recipe.iterations * sum(unit.iteration(self.batch(unit)) for unit in self.units)

    def seconds(self, cache: int, slower: float) -> float:
        """All of it; `slower` is a quantized forward pass over a float one."""
        factor = slower if self.quantizing else 1.0
        found = self.capturing(cache, factor) + self.judging(factor) + self.learning() + len(self.units) * self.setup
        return self.rounds * found

    def cached(self, cache: int) -> tuple[int, int]:
        """Bytes of inputs and outputs that are kept at once at most: in memory, and beyond the budget on disk."""
        wanted = [max((sum(self.stored(u) for u in group) for group in self.groups(cache)), default=0)]
        budgets = [cache // 2]
        if "quantized" in self.recipe.inputs.origins:
            wanted += [
                self.samples * max((getattr(u, what) for u in self.driven), default=0) for what in ("fed", "returned")
            ]
            wanted.append(min(cache // 4, self.samples * sum(u.returned for u in self.driven)))
            budgets += [cache // 4] * 3
        pairs = list(zip(wanted, budgets, strict=True))
        return sum(min(pair) for pair in pairs), sum(max(0, size - budget) for size, budget in pairs)

    def stored(self, unit: UnitCost) -> int:
        """Bytes of what the float network is fed (if that is wanted) and returns at a unit."""
        return self.samples * (unit.returned + ("float" in self.recipe.inputs.origins) * unit.fed)

    def working(self) -> int:
        """Bytes of the dearest unit's iteration and of the batches that are drawn together for it."""

        def needed(unit: UnitCost) -> int:
            batch, row = self.batch(unit), unit.fed * len(self.recipe.inputs.origins) + unit.returned
            together = min(RandomBatches.chunk, self.recipe.iterations) if batch < self.rows(unit) else 0
            return unit.learning_memory(batch) + together * batch * row

        return max((needed(unit) for unit in self.units), default=0)


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds and bytes.

    Args:
        forward: a row through the float network.
        observing: seconds of a row while activation ranges are observed.
        call, quantized_call: the prediction for one image, guidance included.
        decoding: one image from the denoiser's space; its memory is that of one batch.
        grids: seconds of placing all weight grids once.
        network: bytes of the float network.
        sample, image: bytes of one calibration sample and of one finished image.
        process: bytes that the process has taken already, the float network included if it is not on a device of its own.
    """

    forward: Pass
    observing: float
    call: Pass
    quantized_call: Pass
    decoding: Pass
    grids: float
    network: int
    sample: int
    image: int
    process: int

    @property
    def slower(self) -> float:
        """A quantized forward pass over a float one."""
        return self.quantized_call.seconds / self.call.seconds


@dataclass(frozen=True)
class Counts:
    """How much of everything a run still has to do; what is finished or not asked for is 0, None or absent.

    Args:
        calls: network calls for one image.
        timesteps: distinct ones among them.
        halves: rows of a network call for one image: 2 under guidance.
        batch: images that go through the network together.
        cache: bytes of memory for cached inputs and outputs.
        trajectories: images of the calibration set, `collecting` if it is still to be made.
        grids: how often all weight grids are placed.
        observed: calibration samples that ranges are observed on, by phase.
        together: samples that are observed in one pass.
        courses: learning, by phase.
        phases: those that run.
        correction: trajectories that noise statistics are taken from, times activation widths.
        images: by stage.
        diagnostics: trajectories that are compared; `passes` of one image through the quantized network, by diagnosis.
        engine: what executes the finished model too, empty for nothing; `exporting` if its files are still to be made,
            `engine_diagnostics` trajectories of it that are compared.
    """

    calls: int
    timesteps: int
    halves: int
    batch: int
    cache: int
    trajectories: int
    collecting: bool = False
    grids: int = 0
    phases: tuple[str, ...] = ()
    observed: Mapping[str, int] = field(default_factory=dict)
    together: int = 1
    courses: Mapping[str, Course] = field(default_factory=dict)
    correction: int = 0
    widths: int = 1
    images: Mapping[str, int] = field(default_factory=dict)
    diagnostics: int = 0
    passes: Mapping[str, int] = field(default_factory=dict)
    engine: str = ""
    exporting: bool = False
    engine_diagnostics: int = 0

    @property
    def samples(self) -> int:
        """Of the whole calibration set."""
        return self.trajectories * self.calls * self.halves


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes. Bytes: on the device that computes (networks, one pass), in the host's memory, on disk."""

    name: str
    seconds: float
    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a run takes, stage by stage, on top of what the process has already taken; `note` says what was not measured."""

    stages: tuple[StageEstimate, ...]
    process: int
    accelerated: bool = False
    note: str = ""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of memory at the peak."""
        beside = (stage.host if self.accelerated else stage.host + stage.device for stage in self.stages)
        return self.process + max(beside, default=0)

    @property
    def device(self) -> int:
        """Bytes of the accelerator's memory at the peak; 0 without one."""
        return max((stage.device for stage in self.stages), default=0) if self.accelerated else 0

    @property
    def disk(self) -> int:
        """Bytes on disk, of results and of what does not fit the cache."""
        return sum(stage.disk for stage in self.stages)


def phase(name: str, costs: Costs, counts: Counts) -> StageEstimate:
    """Weights or activations."""
    course, observed = counts.courses.get(name), counts.observed.get(name, 0)
    grids = counts.grids * costs.grids if name == "weights" else 0.0
    seconds = grids + observed * costs.observing + (course.seconds(counts.cache, costs.slower) if course else 0.0)
    cached, spilled = course.cached(counts.cache) if course else (0, 0)
    samples = counts.samples + max(observed, course.samples if course else 0)  # what a phase sees is a copy
    rows = max(counts.batch, counts.together if observed else 0)
    passing = rows * max(costs.forward.memory, costs.quantized_call.memory // counts.halves)
    return StageEstimate(
        name,
        seconds,
        device=round(costs.network * (1 + INTEGER_SHARE)) + max(passing, course.working() if course else 0),
        host=samples * costs.sample + cached,
        disk=round(costs.network * INTEGER_SHARE) + spilled,
    )


def reckon(costs: Costs, counts: Counts, *, accelerated: bool = False) -> Estimate:
    """Seconds and bytes of all that is still to be done."""
    found: list[StageEstimate] = []
    batch, calls = counts.batch, counts.calls
    quantized = round(costs.network * (1 + INTEGER_SHARE))
    together = quantized + batch * costs.quantized_call.memory
    if counts.collecting:
        size = counts.samples * costs.sample  # in parts, joined, and put in order
        seconds = counts.trajectories * calls * costs.call.seconds
        found.append(StageEstimate("trajectory", seconds, batch * costs.call.memory, 3 * size, size))
    found += [phase(name, costs, counts) for name in counts.phases]
    if counts.correction:
        seconds = counts.correction * (
            calls * costs.call.seconds + counts.timesteps * counts.widths * costs.quantized_call.seconds
        )
        found.append(StageEstimate("correction", seconds, together))
    if counts.exporting:
        found.append(StageEstimate(counts.engine, batch * costs.quantized_call.seconds, together, disk=costs.network))
    for name, count in counts.images.items():
        call, network = (costs.call, 0) if name == "float images" else (costs.quantized_call, quantized)
        seconds = count * (calls * call.seconds + costs.decoding.seconds)
        device = network + max(batch * call.memory, costs.decoding.memory, costs.network if network else 0)
        found.append(StageEstimate(name, seconds, device, disk=count * costs.image))
    compared = {"diagnostics": counts.diagnostics, f"{counts.engine} diagnostics": counts.engine_diagnostics}
    for name, count in compared.items():
        if count:  # all in one batch; the quantized network on both trajectories
            seconds = count * calls * (2 * costs.quantized_call.seconds + costs.call.seconds)
            found.append(StageEstimate(name, seconds, quantized + count * costs.quantized_call.memory))
    found += [StageEstimate(name, n * costs.quantized_call.seconds, together) for name, n in counts.passes.items()]
    if accelerated:
        found = [StageEstimate(s.name, s.seconds, s.device + costs.network, s.host, s.disk) for s in found]
    return Estimate(tuple(found), costs.process, accelerated)


def show(estimate: Estimate, console: Console) -> None:
    """A short table. Scoring, loading and saving are not in it."""
    say(console, f"estimate: {summary(estimate)}")
    view = Table()
    for name in ("stage", "time", "share", "GPU memory" if estimate.accelerated else "memory"):
        view.add_column(name, justify="left" if name == "stage" else "right", overflow="fold")
    for stage in estimate.stages:
        memory = stage.device if estimate.accelerated else estimate.process + stage.device + stage.host
        share = f"{stage.seconds / max(estimate.seconds, 1e-9):.0%}"
        view.add_row(stage.name, format_duration(stage.seconds), share, format_bytes(memory))
    console.print(view)
    if estimate.note:
        say(console, estimate.note)


def summary(estimate: Estimate) -> str:
    """The totals in one line."""
    on_device = f"{format_bytes(estimate.device)} on the GPU, " if estimate.accelerated else ""
    memory = f"{on_device}{format_bytes(estimate.host)} of memory"
    return f"{format_duration(estimate.seconds)}, {memory}, {format_bytes(estimate.disk)} on disk"
