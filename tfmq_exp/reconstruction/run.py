"""Reconstruct a quantized network unit by unit, in order, keeping every finished unit."""

import functools
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.reconstruction.cache import Leaves, RandomBatches, Storage
from tfmq_exp.reconstruction.capture import capture_inputs, capture_outputs, groups_within, output_bytes
from tfmq_exp.reconstruction.module import BlockReconstruction, Recipe
from tfmq_exp.reconstruction.partition import Unit
from tfmq_exp.sampling.seeds import derive_seed
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

JUDGED = 128  # samples that a unit's error is measured on, before and after


@dataclass(frozen=True)
class UnitReport:
    """What learning one unit did. Errors are of its outputs, relative to their variance, on part of the calibration set."""

    unit: str
    kind: str
    layers: int
    weights: int
    error_nearest: float
    error_learned: float
    seconds: float
    peak_mib: float


class Keeper(Protocol):
    """Keeps finished units, so that an interrupted run goes on after the last of them."""

    def get(self, unit: str) -> Mapping[str, QuantizedWeight] | None:
        """The integers of a finished unit, or None."""
        ...

    def put(self, unit: str, integers: Mapping[str, QuantizedWeight], report: UnitReport) -> None:
        """Keep a unit that has just been learned."""
        ...


class Watcher(Protocol):
    """Is told how the work goes."""

    def start(self, units: int) -> None:
        """Before the first unit."""
        ...

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        """After some iterations of a unit."""
        ...

    def finished(self, unit: str, report: UnitReport | None) -> None:
        """After a unit; without a report if it was finished before."""
        ...


@dataclass(frozen=True)
class Means:
    """What the work may use: forward batch size, bytes of cached activations, and how a Lightning trainer is made."""

    batch: int
    cache_bytes: int
    trainer: Callable[..., pl.Trainer]


def quiet_trainer(accelerator: str) -> Callable[..., pl.Trainer]:
    """Makes trainers for units: one device, and nothing written, drawn or said for each of the many."""
    return functools.partial(
        pl.Trainer,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Report(pl.Callback):
    """Tells the watcher about the loss."""

    def __init__(self, watcher: Watcher, unit: str, iterations: int) -> None:
        self.watcher, self.unit, self.iterations = watcher, unit, iterations

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """After some iterations."""
        assert isinstance(module, BlockReconstruction)
        self.watcher.iteration(self.unit, module.count, self.iterations, float(module.error))


def reconstruct(
    model: QuantizedUNet,
    float_unet: nn.Module,
    anatomy: Anatomy,
    partition: Callable[[Anatomy, frozenset[str]], list[Unit]],
    data: CalibrationSet,
    recipe: Recipe,
    means: Means,
    seed: int,
    keeper: Keeper,
    watcher: Watcher,
) -> None:
    """Learn the rounding of every quantized weight and freeze it to integers.

    A unit learns from the outputs of the float network, on the inputs that the already quantized part of the network gives
    it. Finished units are taken from the keeper; the random numbers of a unit depend on the seed and its name alone, so the
    result is the same however often the work was interrupted.
    """
    units = partition(anatomy, frozenset(model.weight_sites()))
    watcher.start(len(units))
    todo: list[Unit] = []
    for unit in units:
        integers = None if todo else keeper.get(unit.name)
        if integers is None:
            todo.append(unit)
            continue
        for site, integer in integers.items():
            model.freeze(site, integer)
        watcher.finished(unit.name, None)
    model.place_weight_grids()
    inputs_storage, targets_storage = Storage(means.cache_bytes // 2), Storage(means.cache_bytes // 2)
    timesteps = torch.tensor(model.clock.timesteps)
    for unit, targets in float_targets(todo, float_unet, data, timesteps, means, targets_storage):
        began = time.perf_counter()
        module = unit.module(model.unet)
        if unit.driver == "timesteps":
            inputs = Leaves.of(((timesteps,), {}))
        else:
            inputs = capture_inputs(model, module, data, means.batch, inputs_storage)
        errors = learn(model, unit, module, inputs, targets, recipe, means, derive_seed(seed, unit.name), watcher)
        for site in unit.sites:
            model.freeze(site)
        inputs_storage.clear()
        report = UnitReport(
            unit.name,
            unit.kind.value,
            len(unit.sites),
            sum(anatomy.sites[site].weights for site in unit.sites),
            *errors,
            seconds=time.perf_counter() - began,
            peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
        keeper.put(unit.name, {site: model.integers[site] for site in unit.sites}, report)
        watcher.finished(unit.name, report)


def float_targets(
    units: Sequence[Unit],
    float_unet: nn.Module,
    data: CalibrationSet,
    timesteps: Tensor,
    means: Means,
    storage: Storage,
) -> Iterator[tuple[Unit, Leaves]]:
    """Every unit with its float outputs. One pass over the data serves as many units as the storage has room for."""
    driven = {unit.name: unit for unit in units if unit.driver == "denoiser"}
    modules = {name: unit.module(float_unet) for name, unit in driven.items()}
    sizes = {name: size * len(data) for name, size in output_bytes(float_unet, modules, data).items()}
    group_of = {name: group for group in groups_within({n: sizes[n] for n in driven}, storage.budget) for name in group}
    stored: dict[str, Leaves] = {}
    for unit in units:
        if unit.driver == "timesteps":
            with torch.no_grad():
                outputs = unit.module(float_unet)(timesteps.to(next(float_unet.parameters()).device))
            yield unit, Leaves.of(outputs)
            continue
        if unit.name not in stored:
            storage.clear()
            group = [driven[name] for name in group_of[unit.name]]
            stored = capture_outputs(float_unet, group, data, means.batch, storage)
        yield unit, stored.pop(unit.name)


def learn(
    model: QuantizedUNet,
    unit: Unit,
    module: nn.Module,
    inputs: Leaves,
    targets: Leaves,
    recipe: Recipe,
    means: Means,
    seed: int,
    watcher: Watcher,
) -> tuple[float, float]:
    """Learn one unit's rounding; returns the output error of nearest rounding and of the learned one."""
    layers = [model.layer(site) for site in unit.sites]
    quantizers = model.weight_quantizers(unit.sites)
    split = len(inputs.tensors)

    def arrange(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        return inputs.structure(tensors[:split]), targets.structure(tensors[split:])

    tensors = [*inputs.tensors, *targets.tensors]
    some = [x[:: max(1, len(x) // JUDGED)] for x in tensors]  # evenly spread over the steps
    device = next(model.parameters()).device
    with modes(quantizers, Mode.QUANTIZE):
        nearest = relative_error(module, some, arrange, means.batch, device)
        roundings = [q.learn_rounding(layer.weight) for layer, q in zip(layers, quantizers, strict=True)]
        batches = RandomBatches(tensors, recipe.batch, recipe.iterations, seed)
        trainer = means.trainer(max_epochs=1, callbacks=[Report(watcher, unit.name, recipe.iterations)])
        with torch.enable_grad():
            trainer.fit(BlockReconstruction(module, roundings, arrange, recipe), batches)
        module.to(device)
        for rounding in roundings:
            rounding.harden()
        learned = relative_error(module, some, arrange, means.batch, device)
    return nearest, learned


@torch.no_grad()
def relative_error(
    module: nn.Module,
    tensors: Sequence[Tensor],
    arrange: Callable[[Sequence[Tensor]], tuple[Any, Any]],
    batch: int,
    device: torch.device,
) -> float:
    """Mean squared error of the unit's outputs over their variance, averaged over its outputs."""
    squared: list[Tensor] = []
    power: list[Tensor] = []
    for start in range(0, len(tensors[0]), batch):
        (args, kwargs), targets = arrange([x[start : start + batch].to(device) for x in tensors])
        outputs, wanted = pytree.tree_leaves(module(*args, **kwargs)), pytree.tree_leaves(targets)
        squared.append(torch.stack([(o - w).square().sum() for o, w in zip(outputs, wanted, strict=True)]))
        power.append(
            torch.stack([torch.stack([w.sum(), w.square().sum(), torch.tensor(w.numel()).to(w)]) for w in wanted])
        )
    total = torch.stack(power).double().sum(0)
    count = total[:, 2]
    variance = total[:, 1] / count - (total[:, 0] / count) ** 2
    return float((torch.stack(squared).double().sum(0) / count / variance).mean())
