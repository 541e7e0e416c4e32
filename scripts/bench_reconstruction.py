"""CPU seconds of the whole recipe: ours beside the published one written down plainly, on the same network and data.

    python scripts/bench_reconstruction.py DIR [--iterations 200]

DIR is a folder as `compare_reference.py` takes it; its recorded seconds come from another machine, these do not. The plain
version does what the original program does: every range candidate of every channel in turn; for every unit a float and a
quantized pass from the network's input to the unit; AdaRound, loss and penalty through autograd, the floor taken anew,
gradients also for weights, biases and norms, the graph retained, Adam tensor by tensor; and for activations a range search
whose result the moving average replaces. Both learn the same units in turn, in this process, so their ratio does not depend
on the machine's speed. Set OMP_NUM_THREADS=1.
"""

import argparse
import contextlib
import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from compare_reference import NoCheckpoints, fuses_qkv, learning_of, read, released_plan
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.denoisers.loading import compvis_unet
from tfmq_exp.denoisers.unet import attentions, read_structure
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.rounding import inverse_rectified_sigmoid
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, quiet_trainer
from tfmq_exp.reconstruction.loop import capture_float_units, reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.units import TemporalAware, Unit
from tfmq_exp.surgery.config import ScalePlan
from tfmq_exp.surgery.quantized_unet import QuantizedUNet, build_quantized_unet
from tfmq_exp.surgery.resolve import resolve


def plain(
    model: QuantizedUNet,
    unit: Unit,
    unet: nn.Module,
    inputs: TensorTree,
    targets: TensorTree,
    recipe: ReconstructionConfig,
) -> None:
    """Learn one unit as the papers write it: no gradient by hand, nothing frozen, nothing computed once."""
    module = unit.module(unet)
    prefix = "unet." if unit.driver == "timesteps" else ""
    names = [prefix + layer if prefix else layer.removeprefix(unit.name).removeprefix(".") for layer in unit.layers]
    names = [f"{name}.weight".removeprefix(".") for name in names]
    quantizers = model.weight_quantizers(unit.layers)
    originals = [module.get_parameter(name) for name in names]
    alphas = [
        inverse_rectified_sigmoid((w / q.scale - (w / q.scale).floor()).detach()).requires_grad_()
        for w, q in zip(originals, quantizers, strict=True)
    ]
    rounding = recipe.rounding
    assert rounding is not None
    optimizer = torch.optim.Adam(alphas, lr=rounding.learning_rate)
    split = len(inputs.tensors)
    tensors, drawn = [*inputs.tensors, *targets.tensors], RandomRows(len(inputs), recipe.batch, recipe.iterations, 0)
    for count, rows in enumerate(drawn.batches(), start=1):
        batch = [x[rows] for x in tensors]
        hs = [(torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1) for alpha in alphas]
        soft = {
            name: q.scale * (((w / q.scale).floor() + h + q.zero_point).clamp(q.spec.qmin, q.spec.qmax) - q.zero_point)
            for name, w, q, h in zip(names, originals, quantizers, hs, strict=True)
        }
        _, args, kwargs = inputs.structure(batch[:split])
        outputs = pytree.tree_leaves(functional_call(module, soft, args, kwargs))
        expected: list[Tensor] = pytree.tree_leaves(targets.structure(batch[split:]))
        errors = [(out - want).abs().pow(2.0).sum(1).mean() for out, want in zip(outputs, expected, strict=True)]
        loss = torch.stack(errors).sum()
        if rounding.annealing.active(count, recipe.iterations):
            beta = rounding.annealing.beta(count, recipe.iterations)
            for h in hs:
                loss = loss + rounding.penalty_weight * (1 - ((h - 0.5).abs() * 2).pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()


def plain_search(x: Tensor, bits: int) -> Tensor:
    """The best of 80 ranges for one tensor, one after the other; its scale."""
    best, scale, levels = 1e10, x.new_ones(()), 2**bits
    low, high = x.min(), x.max()
    for i in range(80):
        delta = (high - low) * (1 - 0.01 * i) / (levels - 1)
        zero_point = (-low * (1 - 0.01 * i) / delta).round()
        codes = ((x / delta).round() + zero_point).clamp(0, levels - 1)
        score = float((x - delta * (codes - zero_point)).abs().pow(2.4).mean())
        if score < best:
            best, scale = score, delta
    return scale


@torch.no_grad()
def plain_weight_grids(model: QuantizedUNet) -> None:
    """Channel by channel."""
    for layer in model.weight_layers():
        for quantizer, weight in model.layer(layer).weight_parts():
            for channel in weight:
                plain_search(channel, quantizer.spec.bits)


def plain_capture(model: nn.Module, unet: nn.Module, unit: Unit, data: CalibrationSet, batch: int) -> None:
    """Two passes from the start of the network to the unit, in the batches that it learns with."""
    if unit.driver == "denoiser":
        for network, inner in ((unet, unet), (model, model.get_submodule("unet"))):
            Capture(data, batch, SpillAllocator(2**32)).inputs(network, unit.module(inner))


@torch.no_grad()
def plain_activations(model: QuantizedUNet, data: CalibrationSet, bits: int) -> None:
    """Per sampling step: a search for every quantized input, then a pass that takes minimum and maximum instead."""
    layers = [name for name, line in model.plan.layers.items() if line.input]

    def search(_: nn.Module, args: tuple[Tensor]) -> None:
        plain_search(args[0], bits)

    def range_of(_: nn.Module, args: tuple[Tensor]) -> None:
        torch.stack([args[0].flatten(1).amin(1), args[0].flatten(1).amax(1)])

    for step in range(model.context.num_steps):
        for hook in (search, range_of):
            with contextlib.ExitStack() as hooks:
                for layer in layers:
                    hooks.enter_context(model.layer(layer).register_forward_pre_hook(hook))
                model(**data[data.step == step].inputs(torch.device("cpu")))


class Stopwatch:
    """CPU seconds by phase, for the plain version and for ours."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    @contextmanager
    def of(self, who: str, phase: str) -> Iterator[None]:
        """Add the CPU seconds of a block."""
        start = time.process_time()
        yield
        row = self.seconds.setdefault(phase, {"ours": 0.0, "plain": 0.0})
        row[who] += time.process_time() - start

    def table(self, title: str) -> Table:
        """All phases and their sum."""
        table = Table(title=title, title_justify="left")
        for column in ("", "ours, s", "plain, s", "ours / plain"):
            table.add_column(column, justify="right" if column else "left")
        total = {who: sum(row[who] for row in self.seconds.values()) for who in ("ours", "plain")}
        for phase, row in {**self.seconds, "total": total}.items():
            table.add_row(phase, f"{row['ours']:.2f}", f"{row['plain']:.2f}", f"{row['ours'] / row['plain']:.2f}")
        return table


def main() -> None:
    """Time every phase twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, help="per unit (default: the recipe's)")
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    reference = json.loads((args.folder / "reference.json").read_text(encoding="utf-8"))
    recipe, tensors = reference["recipe"], load_file(args.folder / "data.safetensors")
    unet = compvis_unet.load_unet(reference["architecture"], load_file(args.folder / "init_state.safetensors"))
    learnable = copy.deepcopy(unet).requires_grad_(True)
    timesteps = sorted((int(t) for t in tensors["tsteps"]), reverse=True)
    data = read(tensors, "cali", timesteps)
    parts = read_structure(unet, {k: v[:1] for k, v in data.inputs(torch.device("cpu")).items()})
    plan = released_plan(recipe["w_bits"], recipe["a_bits"], fuses_qkv(reference["architecture"]))
    scales = ScalePlan(PerStepConfig(), PerStepConfig())
    resolved = resolve(plan, parts, tuple(attentions(unet)), scales, tuple(timesteps))
    means = ComputeConfig(2 * recipe["batch_size"], 2**32, quiet_trainer(torch.device("cpu")))
    learning = learning_of(recipe, args.iterations or recipe["iters"])
    watch, quiet = Stopwatch(), NoCheckpoints()

    model = build_quantized_unet(unet, resolved, LpObserver())
    units = TemporalAware()(parts, frozenset(model.weight_layers()))
    with watch.of("plain", "weight grids"):
        plain_weight_grids(model)
    with watch.of("ours", "weight grids"):
        model.calibrate_weights()
    context = ReconstructionContext(model, unet, parts, data, means, 0, quiet, quiet)
    for unit, view in capture_float_units(context, units, learning):
        inputs = view.inputs.get("float") or Capture(data, means.batch, SpillAllocator(2**32)).inputs(
            model, unit.module(model.unet)
        )
        with watch.of("plain", "capture and learning"):
            plain_capture(model, unet, unit, data, recipe["batch_size"])
            plain(model, unit, learnable, inputs, view.outputs, learning)
        for layer in unit.layers:
            model.freeze(layer)
    with watch.of("plain", "activation ranges"):
        plain_activations(model, data, recipe["a_bits"])

    model = build_quantized_unet(unet, resolved, LpObserver())
    with watch.of("ours", "capture and learning"):
        reconstruct(replace(context, model=model), units, learning)
    with watch.of("ours", "activation ranges"):
        CalibrateRanges(recipe["samples_per_step"], EveryKth()).ranges(model, data, 0)
    Console().print(watch.table(f"CPU seconds, {len(units)} units of {learning.iterations} iterations"))


if __name__ == "__main__":
    with standard_streams():
        main()
