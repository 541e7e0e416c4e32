"""Reconstruct a quantized network unit by unit, in order, keeping every finished unit."""

import functools
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.finite import DivergedError, relative, within
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.reconstruction.activation_cache import RandomBatches, SpillAllocator, TensorTree
from tfmq_exp.reconstruction.callbacks import LossCallback, ProgressCallback, UnitCheckpointer, UnitReport, UnitResult
from tfmq_exp.reconstruction.capture import (
    OutputReplay,
    UnitActivations,
    bytes_at,
    capture_float,
    capture_inputs,
    groups_within,
    run_unit,
)
from tfmq_exp.reconstruction.gradients import flat
from tfmq_exp.reconstruction.inputs import Origin
from tfmq_exp.reconstruction.module import BlockReconstruction, ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

ERROR_SAMPLES = 128  # samples that a unit's error is measured on, before and after


@dataclass(frozen=True)
class ComputeConfig:
    """What the work may use: forward batch size, bytes of cached activations, and how a Lightning trainer is made.

    `cache_folder` is where activations go that do not fit: the system's temporary folder by default. `cache_bytes` is what this
    process has of what all may use. `checkpoint_every` bounds what a killed training has to do again.
    """

    batch: int
    cache_bytes: int
    trainer: Callable[..., pl.Trainer]
    cache_folder: Path | None = None
    processes: ProcessGroup = ALONE
    checkpoint_every: timedelta = timedelta(minutes=5)

    def storage(self, parts: int = 1) -> SpillAllocator:
        """Room for one of so many equal parts of the cache."""
        return SpillAllocator(self.cache_bytes // parts, self.cache_folder)


def quiet_trainer(device: torch.device) -> Callable[..., pl.Trainer]:
    """Makes trainers for units: one device, and nothing written, drawn or said for each of the many."""
    return functools.partial(
        pl.Trainer,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1 if device.index is None else [device.index],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@dataclass(frozen=True)
class ReconstructionContext:
    """What a phase of a method works on, and with what.

    Args:
        model: the network that is being quantized.
        float_unet: the one that it shall be near to.
        structure: their parts.
        data: calibration samples.
        means: memory and machine.
        seed: of all random numbers.
        keeper: what survives a crash.
        watcher: who is told.
    """

    model: QuantizedUNet
    float_unet: nn.Module
    structure: UNetStructure
    data: CalibrationSet
    means: ComputeConfig
    seed: int
    keeper: UnitCheckpointer
    watcher: ProgressCallback

    def on(self, data: CalibrationSet) -> "ReconstructionContext":
        """The same with other samples."""
        return replace(self, data=data)


def reconstruct(task: ReconstructionContext, units: Sequence[Unit], recipe: ReconstructionConfig) -> None:
    """Learn, unit by unit, what the recipe says: the rounding of weights (frozen to integers after), activation scales, or both.

    A unit learns to return what the float unit returns, on inputs that the recipe chooses. Finished units are taken from the
    keeper; the random numbers of a unit depend on the seed and its name alone, so the result is the same however often the
    work was interrupted.
    """
    model, means, data = task.model, task.means, task.data
    units = [unit for unit in units if is_learnable(model, unit, recipe)]
    task.watcher.start(len(units))
    todo: list[Unit] = []
    for unit in units:
        learned = None if todo else task.keeper.get(unit.name)
        if learned is None:
            todo.append(unit)
            continue
        for site, integers in learned.integers.items():
            model.freeze(site, integers)
        model.load_activations(learned.activations)
        task.watcher.finished(unit.name, None)
    if recipe.rounding:
        model.calibrate_weights()
    storage, replay = means.storage(4), OutputReplay(means.cache_bytes // 4)
    timesteps = torch.tensor(model.context.timesteps)
    for unit, view, importance in capture_float_units(todo, task.float_unet, data, timesteps, recipe, means):
        began = time.perf_counter()
        module = unit.module(model.unet)
        fed: dict[Origin, TensorTree] = {"float": view.fed} if view.fed else {}
        if "quantized" in recipe.inputs.origins and unit.driver == "denoiser":
            with replay.instead(means.batch), within(f"what reaches {unit.name} in the quantized network"):
                fed["quantized"] = capture_inputs(model, module, data, means.batch, storage)
        fed = {origin: fed.get(origin) or view.fed for origin in recipe.inputs.origins}  # type: ignore[misc]
        first, judged = fed[recipe.inputs.origins[0]], max(1, len(view.returned) // ERROR_SAMPLES)
        rounded = modes(model.weight_quantizers(unit.sites) if recipe.rounding else (), Mode.QUANTIZE)
        with rounded, within(f"the quantized unit {unit.name}"):
            before = run_unit(module, model.context, first.every(judged), means.batch, means.storage())
            optimise_unit(task, unit, module, fed, view.returned, importance, recipe)
        for site in unit.sites if recipe.rounding else ():
            if site in model.weight_layers():
                model.freeze(site)
        if unit.driver == "denoiser" and "quantized" in fed:
            returned = run_unit(module, model.context, first, means.batch, means.storage(4))
            replay.add(module, returned)
            after = returned.every(judged)
        else:
            after = run_unit(module, model.context, first.every(judged), means.batch, means.storage())
        wanted = view.returned.every(judged)
        storage.clear()
        report = UnitReport(
            unit.name,
            unit.kind.value,
            len(unit.sites),
            sum(task.structure.sites[site].weights for site in unit.sites),
            relative_error(before, wanted),
            relative_error(after, wanted),
            seconds=time.perf_counter() - began,
            peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
        task.keeper.put(unit.name, unit_result(model, unit, recipe), report)
        task.watcher.finished(unit.name, report)


def quantizers_of(model: QuantizedUNet, unit: Unit, recipe: ReconstructionConfig) -> dict[str, AffineQuantizer]:
    """Activation quantizers of a unit that the recipe can learn."""
    if recipe.scales is None:
        return {}
    found = model.activation_quantizers_in(unit.name, unit.sites)
    return {name: quantizer for name, quantizer in found.items() if any(True for _ in quantizer.source.trainable())}


def is_learnable(model: QuantizedUNet, unit: Unit, recipe: ReconstructionConfig) -> bool:
    """Whether the recipe finds weights or scales in a unit."""
    weights = set(unit.sites).intersection(model.weight_layers()) if recipe.rounding else set()
    return bool(weights or quantizers_of(model, unit, recipe))


def unit_result(model: QuantizedUNet, unit: Unit, recipe: ReconstructionConfig) -> UnitResult:
    """For the keeper."""
    sites = [site for site in unit.sites if recipe.rounding and site in model.integers]
    activations = {
        f"{name}.{key}": value.detach().clone()
        for name, quantizer in quantizers_of(model, unit, recipe).items()
        for key, value in quantizer.state_dict().items()
    }
    return UnitResult({site: model.integers[site] for site in sites}, activations)


def capture_float_units(
    units: Sequence[Unit],
    float_unet: nn.Module,
    data: CalibrationSet,
    timesteps: Tensor,
    recipe: ReconstructionConfig,
    means: ComputeConfig,
) -> Iterator[tuple[Unit, UnitActivations, TensorTree | None]]:
    """Every unit with what the float network does there and how much each element of it matters.

    One pass over the data serves as many units as half the cache has room for.
    """
    with_inputs, storage = "float" in recipe.inputs.origins, means.storage(2)
    driven = {unit.name: unit for unit in units if unit.driver == "denoiser"}
    modules = {name: unit.module(float_unet) for name, unit in driven.items()}
    sizes = {name: size * len(data) for name, size in bytes_at(float_unet, modules, data, fed=with_inputs).items()}
    group_of = {name: group for group in groups_within({n: sizes[n] for n in driven}, storage.budget) for name in group}
    views: dict[str, UnitActivations] = {}
    importance: dict[str, TensorTree] = {}
    for unit in units:
        if unit.driver == "timesteps":
            with torch.no_grad():
                outputs = unit.module(float_unet)(timesteps.to(next(float_unet.parameters()).device))
            yield unit, UnitActivations(TensorTree.of((timesteps, (timesteps,), {})), TensorTree.of(outputs)), None
            continue
        if unit.name not in views:
            storage.clear()
            group = [driven[name] for name in group_of[unit.name]]
            views = capture_float(float_unet, group, data, means.batch, storage, fed=with_inputs)
            importance = dict(recipe.objective.importance(float_unet, group, data, means.batch, storage))
        yield unit, views.pop(unit.name), importance.pop(unit.name, None)


def optimise_unit(
    task: ReconstructionContext,
    unit: Unit,
    module: nn.Module,
    fed: Mapping[Origin, TensorTree],
    wanted: TensorTree,
    importance: TensorTree | None,
    recipe: ReconstructionConfig,
) -> None:
    """Learn one unit; its weights end rounded up or down."""
    model, seed = task.model, derive_seed(task.seed, unit.name)
    device = next(model.parameters()).device
    samples = TensorTree.of(
        {
            "fed": {origin: leaves.whole for origin, leaves in fed.items()},
            "wanted": wanted.whole,
            "importance": importance.whole if importance else None,
        }
    )
    roundings: list[AdaRound] = []
    if recipe.rounding:
        roundings = [rounding for site in unit.sites for rounding in model.learn_rounding(site)]
    quantizers = quantizers_of(model, unit, recipe)
    sources = [quantizer.source for quantizer in quantizers.values()]
    inside = list(model.activation_quantizers_in(unit.name, unit.sites).values())
    processes = task.means.processes
    lesson = BlockReconstruction(
        module, model.context, roundings, sources, samples.structure, recipe, seed=seed, processes=processes
    )
    batches = RandomBatches(samples.tensors, recipe.batch, recipe.iterations, seed)
    trainer = task.means.trainer(max_epochs=1, callbacks=[LossCallback(task.watcher, unit.name, recipe.iterations)])
    with trainable_parameters(sources, seed), recipe.inputs.inside(inside):
        trainer.fit(lesson, batches)
    module.to(device)
    learned = flat([x.detach() for x in lesson.learned()])
    processes.check_same(f"what {unit.name} has learned", learned)
    if not bool(learned.isfinite().all()):  # a NaN would be rounded down like any other number
        raise DivergedError(f"the unit {unit.name}", recipe.iterations, recipe.iterations, math.nan, recipe.rates)
    for rounding in roundings:
        rounding.harden()


@contextmanager
def trainable_parameters(sources: Sequence[ScaleProvider], seed: int) -> Iterator[None]:
    """Sources learn (their dropout is on), and random numbers come from the seed, whatever was drawn before."""
    parameters = [parameter for source in sources for parameter in source.trainable()]
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for source in sources:
            source.train()
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
            for source in sources:
                source.eval()


def relative_error(returned: TensorTree, wanted: TensorTree) -> float:
    """Mean squared error of the outputs over their variance, averaged over the outputs."""
    pairs = zip(returned.tensors, wanted.tensors, strict=True)
    sizes = [((r - w.to(r)).square().mean(), w.to(r).var(correction=0)) for r, w in pairs]
    errors = [float(relative(*size, "the outputs of a unit")) for size in sizes]
    return sum(errors) / len(errors)
