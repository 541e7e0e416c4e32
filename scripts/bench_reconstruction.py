"""CPU seconds of learning the rounding: ours beside the published formulas written down plainly, on the same units.

    python scripts/bench_reconstruction.py DIR [--iterations 50]

DIR is a folder as `compare_reference.py` takes it. The plain version is what the original program does in every iteration:
AdaRound, loss and penalty through autograd, the floor taken anew, gradients also for weights, biases and norms, the graph
retained, Adam tensor by tensor. Both run the same units on the same data in turn, in this process, so their ratio does not
depend on the machine's speed.
"""

import argparse
import copy
import json
import logging
import time
import warnings
from pathlib import Path

import torch
from compare_reference import Forgetful, is_unconditional_ldm, read, released_plan
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tfmq_exp.denoisers import compvis
from tfmq_exp.denoisers.unet import anatomy, attentions
from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.quant.ranges import LpSearch
from tfmq_exp.quant.rounding import inverse_rectified_sigmoid
from tfmq_exp.reconstruction.cache import Leaves, RandomBatches, Storage
from tfmq_exp.reconstruction.capture import capture_inputs
from tfmq_exp.reconstruction.inputs import QuantizedInputs
from tfmq_exp.reconstruction.module import LearnRounding, Recipe
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.partition import TemporalAware, Unit
from tfmq_exp.reconstruction.run import Means, float_views, learn, quiet_trainer
from tfmq_exp.surgery.quantized_unet import QuantizedUNet, build
from tfmq_exp.surgery.scales import PerStepScale, ScalePlan


def plain(model: QuantizedUNet, unit: Unit, unet: nn.Module, inputs: Leaves, targets: Leaves, recipe: Recipe) -> None:
    """Learn one unit as the papers write it: no gradient by hand, nothing frozen, nothing computed once."""
    module = unit.module(unet)
    prefix = "unet." if unit.driver == "timesteps" else ""
    names = [prefix + site if prefix else site.removeprefix(unit.name).removeprefix(".") for site in unit.sites]
    names = [f"{name}.weight".removeprefix(".") for name in names]
    quantizers = model.weight_quantizers(unit.sites)
    originals = [module.get_parameter(name) for name in names]
    alphas = [
        inverse_rectified_sigmoid((w / q.scale - (w / q.scale).floor()).detach()).requires_grad_()
        for w, q in zip(originals, quantizers, strict=True)
    ]
    rounding = recipe.rounding
    assert rounding is not None
    optimizer = torch.optim.Adam(alphas, lr=rounding.learning_rate)
    split = len(inputs.tensors)
    batches = RandomBatches([*inputs.tensors, *targets.tensors], recipe.batch, recipe.iterations, seed=0)
    for count, batch in enumerate(batches.batches(), start=1):
        hs = [(torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1) for alpha in alphas]
        soft = {
            name: q.scale * (((w / q.scale).floor() + h + q.zero_point).clamp(q.spec.qmin, q.spec.qmax) - q.zero_point)
            for name, w, q, h in zip(names, originals, quantizers, hs, strict=True)
        }
        _, args, kwargs = inputs.structure(batch[:split])
        outputs = pytree.tree_leaves(functional_call(module, soft, args, kwargs))
        wanted: list[Tensor] = pytree.tree_leaves(targets.structure(batch[split:]))
        errors = [(out - want).abs().pow(2.0).sum(1).mean() for out, want in zip(outputs, wanted, strict=True)]
        loss = torch.stack(errors).sum()
        if rounding.annealing.active(count, recipe.iterations):
            beta = rounding.annealing.beta(count, recipe.iterations)
            for h in hs:
                loss = loss + rounding.penalty_weight * (1 - ((h - 0.5).abs() * 2).pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()


def main() -> None:
    """Time every unit twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=50)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    reference = json.loads((args.folder / "reference.json").read_text())
    recipe, tensors = reference["recipe"], load_file(args.folder / "data.safetensors")
    unet = compvis.load(reference["architecture"], load_file(args.folder / "init_state.safetensors"))
    learnable = copy.deepcopy(unet).requires_grad_(True)
    timesteps = sorted((int(t) for t in tensors["tsteps"]), reverse=True)
    data = read(tensors, "cali", timesteps)
    parts = anatomy(unet, {k: v[:1] for k, v in data.inputs(torch.device("cpu")).items()})
    plan = released_plan(recipe["w_bits"], recipe["a_bits"], is_unconditional_ldm(reference["architecture"]))
    resolved = plan.resolve(parts, tuple(attentions(unet)), ScalePlan(PerStepScale(), PerStepScale()), tuple(timesteps))
    model = build(unet, resolved, LpSearch())
    model.place_weight_grids()
    means = Means(2 * recipe["batch_size"], 2**32, quiet_trainer("cpu"))
    learning = Recipe(
        args.iterations,
        recipe["batch_size"],
        Lp(2.0),
        QuantizedInputs(),
        rounding=LearnRounding(1e-3, recipe["w"], Annealing(0.2, 20.0, 2.0)),
    )
    table = Table(title=f"CPU ms per iteration, {args.iterations} iterations a unit", title_justify="left")
    for column in ("unit", "ours", "plain", "ours / plain"):
        table.add_column(column, justify="left" if column == "unit" else "right")
    total = [0.0, 0.0]
    units = TemporalAware()(parts, frozenset(model.weight_sites()))
    when = torch.tensor(timesteps)
    for unit, view, _ in float_views(units, unet, data, when, learning, means):
        module = unit.module(model.unet)
        inputs = view.fed or capture_inputs(model, module, data, means.batch, Storage(2**32))
        seconds = []
        began = time.process_time()
        plain(model, unit, learnable, inputs, view.returned, learning)
        seconds.append(time.process_time() - began)
        began = time.process_time()
        with modes(model.weight_quantizers(unit.sites), Mode.QUANTIZE):
            learn(model, unit, module, {"quantized": inputs}, view.returned, None, learning, means, 0, Forgetful())
        seconds.insert(0, time.process_time() - began)
        for site in unit.sites:
            model.freeze(site)
        total = [a + b for a, b in zip(total, seconds, strict=True)]
        row = [f"{1e3 * s / args.iterations:.1f}" for s in seconds]
        table.add_row(unit.name, *row, f"{seconds[0] / seconds[1]:.2f}")
    table.add_row("all", *[f"{1e3 * s / args.iterations:.1f}" for s in total], f"{total[0] / total[1]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
