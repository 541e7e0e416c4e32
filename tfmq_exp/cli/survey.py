"""What one of each thing that a run has to do costs: measured in a few passes before the work starts."""

import resource
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.cli.estimate import Costs, Counts, Course, Estimate, reckon
from tfmq_exp.cli.measure import (
    ITERATION,
    PASS,
    PATIENCE,
    PATIENCE_PASSES,
    Clock,
    Pass,
    dearest_first,
    like_their_kind,
    measure_learning,
    measure_pass,
    measure_setup,
    measure_unit,
    rows_for,
    wall_clock,
)
from tfmq_exp.cli.remaining import still_to_do
from tfmq_exp.cli.training_estimate import measure_training
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.pipeline.deployed import DeployedStages, reservation
from tfmq_exp.pipeline.stages import Stages
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.qat.module import TrainingProtocol
from tfmq_exp.qat.train import last_checkpoint
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import UnitActivations, capture_float
from tfmq_exp.reconstruction.loop import is_learnable
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.build import build_quantized_unet
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

SEARCHED = 2**18  # weights on which the range estimator is timed


def estimate(
    stages: Stages, goals: Collection[str], now: Clock | None = None, deployed: DeployedStages | None = None
) -> Estimate | None:
    """What the stages that lead to the goals will take; None where all of them are finished.

    Args:
        stages: the run.
        goals: `trajectory`, `weights`, ... up to the one that the run is to reach.
        now: what seconds are counted with (default: those of the clock on the wall).
        deployed: the same run with the model executed by an engine, where one is asked for.
    """
    counts = still_to_do(stages, goals, deployed)
    work = counts.phases, counts.correction, counts.images, counts.diagnostics, counts.passes, counts.exporting
    if not (counts.collecting or any(work)):
        return None
    with torch.random.fork_rng():  # what is measured shall not change what is drawn later
        survey = Survey(stages, now)
        counts = survey.completed(counts)
        costs = survey.costs(counts)
    accelerated = stages.denoiser.device.type != "cpu"
    expected = reckon(costs, counts, accelerated=accelerated)
    engine = counts.exporting or counts.engine_diagnostics or f"{counts.engine} images" in counts.images
    return replace(expected, note=reservation(counts.engine, accelerated=accelerated)) if engine else expected


class Survey:
    """Measures one network. Its quantized copy has a scale of 1 wherever calibration would put another."""

    def __init__(self, stages: Stages, now: Clock | None = None) -> None:
        self.stages, self.now = stages, now or wall_clock(stages.denoiser.device)
        self.process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        denoiser, sampling = stages.denoiser, stages.sampling
        self.unet, self.device = denoiser.unet, denoiser.device
        self.halves = 2 if sampling.guided else 1
        self.conditions = sampling.conditions(denoiser, stages.seed, "estimate", range(1))
        self.model: QuantizedUNet = build_quantized_unet(self.unet, stages.plan, MinMax())
        self.parts = {block.name: self.unet.get_submodule(block.name) for block in stages.structure.blocks}
        self.call = self.predicting(self.unet, self.parts)
        plain = sampling.precision == "float32"
        self.forward = self.call.shared(self.halves) if plain else self.passing(self.unet, stages.batch, self.parts)

    def predicting(self, network: nn.Module, modules: Mapping[str, nn.Module]) -> Pass:
        """The prediction for one image as the sampler asks for it."""
        ask, t = self.stages.sampling.predictor(network), self.stages.calls[len(self.stages.calls) // 2]

        def call(images: int) -> Tensor:
            given = {name: value.expand(images, *value.shape[1:]) for name, value in self.conditions.given.items()}
            at = torch.full((images,), t, device=self.device)
            return ask(self.noise(images), at, Conditions(given, self.conditions.null))

        return measure_pass(call, self.stages.batch, self.now, modules)

    def passing(self, network: nn.Module, most: int, modules: Mapping[str, nn.Module]) -> Pass:
        """One row of a calibration set."""
        data = self.data(most)
        return measure_pass(lambda rows: network(**data[slice(0, rows)].inputs(self.device)), most, self.now, modules)

    def noise(self, rows: int) -> Tensor:
        """Stands for whatever is denoised."""
        return torch.randn(rows, *self.stages.denoiser.sample_shape, device=self.device)

    def data(self, rows: int) -> CalibrationSet:
        """Stands for the calibration set: rows from all sampling steps."""
        timesteps = torch.tensor(self.model.context.timesteps)
        step = torch.arange(rows) * len(timesteps) // rows
        conditions = {name: value.cpu() for name, value in self.conditions.given.items()}
        none = torch.zeros(rows, dtype=torch.long)
        return CalibrationSet(self.noise(rows).cpu(), timesteps[step], step, none, conditions, none)

    def observing(self, batch: int) -> float:
        """Seconds of a row while ranges are observed; afterwards every activation is quantized."""
        self.set_activations(Mode.OBSERVE)
        seconds = self.passing(self.model, batch, {}).seconds
        self.set_activations(Mode.QUANTIZE)
        return seconds

    def set_activations(self, mode: Mode) -> None:
        """Unlike the model's own method this quantizes also what has seen no data."""
        for quantizer in self.model.activation_quantizers().values():
            quantizer.mode = mode
            for value in quantizer.source.state_dict().values():
                value.nan_to_num_(1.0)

    def completed(self, counts: Counts) -> Counts:
        """With the phases' own work."""
        together = max((observation(p).batch for p in self.phases(counts.phases) if observation(p)), default=1)
        observed = self.observed(counts.phases)
        return replace(counts, courses=self.courses(counts.phases), observed=observed, together=together)

    def costs(self, counts: Counts) -> Costs:
        """Everything that does not depend on what is learned."""
        example = self.noise(1)
        observed = any(counts.observed.values())
        observing = self.observing(counts.together) if observed else 0.0
        self.set_activations(Mode.QUANTIZE)
        sampled = counts.images.keys() - {"float images"}
        quantizes = counts.phases or counts.correction or sampled or counts.passes or counts.exporting
        decoding, image = self.decoding() if counts.images else (Pass(0.0, 0, {}), 0)
        return Costs(
            forward=self.forward,
            observing=observing,
            call=self.call,
            quantized_call=self.predicting(self.model, {}) if quantizes else self.call,
            decoding=decoding,
            grids=self.grids() if counts.grids else 0.0,
            network=sum(p.nbytes for p in self.unet.parameters()),
            sample=example.nbytes + 32,
            image=image,
            process=self.process,
        )

    def decoding(self) -> tuple[Pass, int]:
        """One image from the denoiser's space, with the memory of a batch, and the bytes of a finished one."""
        decoder, batch = self.stages.denoiser.first_stage, self.stages.batch
        found = measure_pass(lambda rows: decoder.decode(self.noise(rows)), batch, self.now, {})
        with torch.no_grad():
            image = decoder.decode(self.noise(1)).numel()
        together = min(batch, getattr(decoder, "rows", batch))  # a decoder that takes only so many rows at once
        return Pass(found.seconds, together * found.memory + batch * 4 * image, {}), image

    def grids(self) -> float:
        """Seconds of placing the grid of every weight, from some channels of the largest."""
        lines = {name: line for name, line in self.stages.plan.sites.items() if line.weight}
        sizes = {name: self.stages.structure.sites[name].weights for name in lines}
        if not sizes:
            return 0.0
        largest = max(sizes, key=lambda name: sizes[name])
        weight, spec = self.unet.get_submodule(largest).get_parameter("weight"), lines[largest].weight
        assert spec is not None
        part = weight[: max(1, SEARCHED // weight[0].numel())] if spec.axis is not None else weight
        began = self.now()
        self.stages.method.weight_observer(part, spec)
        return (self.now() - began) / part.numel() * sum(sizes.values())

    def phases(self, names: Collection[str]) -> list[Any]:
        """The method's phases by name."""
        return [getattr(self.stages.method, name) for name in names]

    def observed(self, names: Collection[str]) -> dict[str, int]:
        """Samples that each phase observes ranges on."""
        sources = [quantizer.source for quantizer in self.model.activation_quantizers().values()]
        if not any(source.needs_data for source in sources):
            return {}
        given = self.stages.calibration.images, len(self.stages.calls)
        found = {name: observation(phase) for name, phase in zip(names, self.phases(names), strict=True)}
        return {name: self.halves * seen.effort(*given).samples for name, seen in found.items() if seen}

    def courses(self, names: Collection[str]) -> dict[str, Course]:
        """What each phase learns, with the cost of every unit; units that an earlier run has finished are left out."""
        found: dict[str, Course] = {}
        entries = {"weights": self.stages.weights, "activations": self.stages.activations}
        for name, phase in zip(names, self.phases(names), strict=True):
            if (protocol := getattr(phase, "protocol", None)) is not None:
                found[name] = self.training(protocol, entries[name])
            recipe: ReconstructionConfig | None = getattr(phase, "recipe", None)
            if recipe is None:
                continue
            sites = self.model.weight_layers() if name == "weights" else self.stages.plan.sites
            units = phase.partition(self.stages.structure, frozenset(sites))
            units = [unit for unit in units if is_learnable(self.model, unit, recipe)]
            folder = entries[name].path / "units"
            units = [unit for unit in units if not (folder / f"{unit.name}.safetensors").is_file()]
            samples = phase.effort(self.stages.calibration.images, len(self.stages.calls)).samples * self.halves
            widths = len(self.model.activation_bits()) or 1
            found[name] = self.course(units, recipe, samples, rounds=1 if recipe.rounding else widths)
        return found

    def training(self, protocol: TrainingProtocol, entry: Entry) -> Any:
        """What is left of a training, by one step of it."""
        self.set_activations(Mode.QUANTIZE)
        for quantizer in self.model.weight_quantizers():
            quantizer.mode = Mode.QUANTIZE
        last = last_checkpoint(entry.path / "checkpoints")
        done = int(last.stem) if last else 0
        data = self.data(-(-protocol.batch // protocol.parts))
        return measure_training(self.model, data, protocol, done, self.forward.seconds, self.now)

    def course(self, units: list[Unit], recipe: ReconstructionConfig, samples: int, rounds: int) -> Course:
        """Units with their costs: the dearest of every kind measured, others as long as patience lasts."""
        quantizing = recipe.scales is not None
        if not units:
            return Course((), recipe, samples, 0, rounds, quantizing)
        self.set_activations(Mode.QUANTIZE if quantizing else Mode.OFF)
        most = min(recipe.batch, samples)
        rows = rows_for(self.forward.seconds, PASS, most)
        timesteps = torch.tensor(self.model.context.timesteps)
        driven = [unit for unit in units if unit.driver == "denoiser"]
        views = self.views(driven, self.data(1))
        taken = sum(view.returned.nbytes + view.fed.nbytes for view in views.values() if view.fed)
        rows = max(1, min(rows, self.stages.means.cache_bytes // max(1, taken)))
        data = self.data(rows)
        views = self.views(driven, data) if rows > 1 else views
        for unit in units:
            if unit.driver == "timesteps":
                t = timesteps[: recipe.batch]
                with torch.no_grad():
                    outputs = unit.module(self.unet)(t.to(self.device))
                views[unit.name] = UnitActivations(TensorTree.of((t, (t,), {})), TensorTree.of(outputs))
        weights = {u.name: sum(self.stages.structure.sites[site].weights for site in u.sites) for u in units}
        costs = {
            u.name: measure_unit(u, self.unet, views[u.name], self.forward.spans.get(u.name), weights[u.name], self.now)
            for u in units
        }
        by_name, began = {unit.name: unit for unit in units}, self.now()
        patience = max(PATIENCE, PATIENCE_PASSES * self.forward.seconds)
        for cost in dearest_first(list(costs.values())):
            if self.now() - began > patience:
                break
            view, batch = views[cost.name], min(recipe.batch, len(timesteps)) if cost.driver == "timesteps" else most
            few = rows_for(4 * cost.span.seconds, ITERATION, len(view.returned))
            part = UnitActivations(first(view.fed, few), first(view.returned, few))
            costs[cost.name] = measure_learning(cost, self.model, by_name[cost.name], part, recipe, batch, self.now)
        importance = self.importance(driven, recipe, data)
        done = tuple(like_their_kind(list(costs.values())))
        least = min(done, key=lambda cost: cost.span.seconds).name
        trainer = self.stages.means.trainer
        setup = measure_setup(self.model, by_name[least], views[least], recipe, trainer, self.now)
        return Course(done, recipe, samples, len(timesteps), rounds, quantizing, importance, setup)

    def views(self, units: list[Unit], data: CalibrationSet) -> dict[str, UnitActivations]:
        """What units are fed and return."""
        return capture_float(self.unet, units, data, len(data), SpillAllocator(2**40), fed=True) if units else {}

    def importance(self, units: list[Unit], recipe: ReconstructionConfig, data: CalibrationSet) -> float:
        """Seconds per sample of finding the weights of the objective, where it has any."""
        began = self.now()
        found = recipe.objective.importance(self.unet, units, data, len(data), SpillAllocator(2**40))
        return (self.now() - began) / len(data) if found else 0.0


def first(leaves: TensorTree | None, rows: int) -> TensorTree:
    """The first rows of what was captured."""
    assert leaves is not None
    return TensorTree([x[:rows] for x in leaves.tensors], leaves.template)


def observation(phase: Any) -> Any:
    """The part of a phase that observes activation ranges: itself, a part of it, or nothing."""
    return phase if hasattr(phase, "ranges") else getattr(phase, "observe", None)
