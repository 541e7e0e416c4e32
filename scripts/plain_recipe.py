"""The published recipe written down plainly, for `bench_reconstruction.py` to time.

It does what the original program does: every range candidate of every channel in turn; for every unit a float and a quantized pass
from the network's input to the unit; AdaRound, loss and penalty through autograd, the floor taken anew, gradients also for
weights, biases and norms, the graph retained, Adam tensor by tensor; and for activations a range search whose result the moving
average replaces.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.quant.rounding import inverse_rectified_sigmoid
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


def plain_learning(
    model: QuantizedNetwork,
    unit: Unit,
    network: nn.Module,
    inputs: TensorTree,
    targets: TensorTree,
    recipe: ReconstructionConfig,
    seed: int,
) -> None:
    """Learn one unit as the papers write it: no gradient by hand, nothing frozen, nothing computed once; round its weights."""
    module = unit.module(network)
    prefix = "network." if unit.driver == "timesteps" else ""
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
    tensors, drawn = (
        [*inputs.tensors, *targets.tensors],
        RandomRows(torch.arange(len(inputs)), recipe.batch, recipe.iterations, seed),
    )
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
    for quantizer, weight, alpha in zip(quantizers, originals, alphas, strict=True):
        rounded = quantizer.learn_rounding(weight)
        rounded.v.data.copy_(alpha.detach())
        rounded.harden()


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
def plain_weight_grids(model: QuantizedNetwork) -> None:
    """Channel by channel."""
    for layer in model.weight_layers():
        for quantizer, weight in model.layer(layer).weight_parts():
            for channel in weight:
                plain_search(channel, quantizer.spec.bits)


def plain_capture(model: nn.Module, unet: nn.Module, unit: Unit, data: CalibrationSet, batch: int) -> None:
    """Two passes from the start of the network to the unit, in the batches that it learns with."""
    if unit.driver == "denoiser":
        for network, inner in ((unet, unet), (model, model.get_submodule("network"))):
            Capture(data, batch, SpillAllocator(2**32)).inputs(network, unit.module(inner))


@torch.no_grad()
def plain_activations(model: QuantizedNetwork, data: CalibrationSet, bits: int) -> None:
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
