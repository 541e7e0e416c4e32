"""Equality of a device with the CPU on the shipped digits model; every difference has a tolerance."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpu.measuring import Row
from gpu.networks import learned_unit, recipe_of, resolved
from tfmq_exp.calibration.dataset import collect_trajectories
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.digits import load_denoiser
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.quant.gptq import gptq
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.spec import QParams
from tfmq_exp.reconstruction.activation_cache import CPU, SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture, UnitActivations
from tfmq_exp.reconstruction.module import BlockReconstruction
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.units import Blockwise
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network

ITERATIONS, BATCH, IMAGES = 8, 8, 4
GREY = 127.5  # grey levels of one unit of an image in [-1, 1]


class Check(NamedTuple):
    """A measured difference between the device and the CPU, and the largest that is accepted."""

    what: str
    difference: float
    tolerance: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # not so for NaN

    def row(self) -> Row:
        return Row(
            self.what, self.difference, self.unit, f"at most {self.tolerance:g}: {'ok' if self.passed else 'MISSED'}"
        )


def rms(x: Tensor, expected: Tensor) -> float:
    """Root of the mean squared difference, over that of the expected values."""
    exact = expected.double()
    return float((x.cpu().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def share(different: Tensor) -> float:
    """Share of the elements that are true."""
    return float(different.double().mean())


class Digits:
    """The shipped model on the CPU and on a device, float and quantized."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.denoiser, self.sampling = device, load_denoiser(), Sampling(DDIM(4))
        self.network = self.on_device(self.denoiser.network)
        self.data = collect_trajectories(self.denoiser, self.sampling, range(IMAGES), seed=0)
        self.structure = read_structure(self.denoiser.network, self.denoiser.example())
        self.plan = resolved(self.denoiser, self.structure, self.sampling.finite_set(self.denoiser))
        self.models = [
            build_quantized_network(network, self.plan, LpObserver())
            for network in (self.denoiser.network, self.network)
        ]
        for model in self.models:
            model.calibrate_weights()
        self.nearest = copy.deepcopy(self.models[0])

    def on_device(self, network: nn.Module) -> nn.Module:
        return copy.deepcopy(network).to(self.device)

    def float_outputs(self) -> list[Check]:
        x, y = (
            network(**self.data.inputs(place)).sample
            for network, place in self.pairs(self.denoiser.network, self.network)
        )
        difference = float((x - y.cpu()).abs().max() / x.abs().max())
        return [Check("float outputs: largest difference", difference, 1e-4, "of largest")]

    def pairs(self, ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Module, torch.device]]:
        return [(ours, CPU), (theirs, self.device)]

    def weight_ranges(self) -> list[Check]:
        """Candidates of a range are compared by their errors, so that a tie may be decided otherwise."""
        ours, theirs = (
            torch.cat([torch.stack([*q.qparams]).flatten(1).cpu() for q in model.weight_quantizers()], dim=1)
            for model in self.models
        )
        different = ~torch.isclose(ours, theirs, rtol=1e-6, atol=0).all(dim=0)
        return [Check("weight ranges: channels with another scale or zero point", share(different), 5e-3, "share")]

    def gptq_codes(self) -> list[Check]:
        """On equal moments; an early code that is rounded otherwise changes later ones, and the error hardly."""
        model = self.models[0]
        name = max(model.weight_layers(), key=lambda layer: model.layer(layer).weight[0].numel())
        (quantizer, part), *_ = model.layer(name).weight_parts()
        weight = part.flatten(1)[None]
        vectors = torch.randn(1, 2 * weight.shape[2], weight.shape[2], generator=torch.Generator().manual_seed(0))
        given = weight, vectors.mT @ vectors, *(x.flatten(1)[None] for x in quantizer.qparams)

        def codes(device: torch.device) -> Tensor:
            matrix, moments, *qparams = (x.to(device) for x in given)
            return gptq(matrix, moments, QParams(*qparams), quantizer.spec).cpu()

        def error(found: Tensor) -> Tensor:
            return (((found - given[3]) * given[2] - weight) @ vectors.mT).double().square().mean()

        ours, theirs = codes(CPU), codes(self.device)
        return [
            Check("GPTQ: other codes", share(ours != theirs), 0.02, "share"),
            Check(
                "GPTQ: error of the layer's outputs", float((error(theirs) / error(ours) - 1).abs()), 0.01, "relative"
            ),
        ]

    def learning(self) -> list[Check]:
        """A few iterations of the largest block from the same samples, in the same batches."""
        units = Blockwise()(self.structure, frozenset(self.plan.layers))
        unit = max(units, key=lambda unit: sum(self.structure.layers[layer].weights for layer in unit.layers))
        capture = Capture(self.data, BATCH, SpillAllocator(2**30))
        captured = capture.activations(self.denoiser.network, [unit], with_inputs=True)[unit.name]
        moves, errors = [], []
        for model, device in self.pairs(*self.models):
            assert isinstance(model, QuantizedNetwork)
            inputs, outputs = (
                TensorTree(tree.structure([x.to(device) for x in tree.tensors]))
                for tree in (captured.inputs["float"], captured.outputs)
            )
            activations = UnitActivations({"float": inputs}, outputs)
            with learned_unit(model, unit, activations, recipe_of(ITERATIONS, BATCH), device) as task:
                assert task.rounding is not None
                start = task.rounding.v.detach().clone()
                for rows in RandomRows(torch.arange(len(self.data)), BATCH, ITERATIONS, seed=0):
                    task.training_step(rows, 0)
                moves.append((task.rounding.v.detach() - start).cpu())
                errors.append(float(task.error))
        return [
            Check(
                f"rounding variables after {ITERATIONS} iterations", rms(moves[1], moves[0]), 0.05, "of their movement"
            ),
            Check(f"a unit's error at iteration {ITERATIONS}", abs(errors[1] / errors[0] - 1), 1e-3, "relative"),
        ]

    def quantized(self) -> QuantizedNetwork:
        """The network on the CPU with weights rounded to nearest and ranges from the trajectories."""
        model = self.nearest
        for layer in model.weight_layers():
            model.freeze(layer)
        model.set_activations(Mode.OBSERVE)
        model(**self.data.inputs(CPU))
        model.set_activations(Mode.QUANTIZE)
        return model

    def sampled(self) -> list[Check]:
        """Outputs and images of networks with the same codes and scales: a value at a tie gets the other code."""
        ours = self.quantized()
        theirs = self.on_device(ours)
        x, y = (network(**self.data.inputs(place)).sample for network, place in self.pairs(ours, theirs))
        pairs = {"float": (self.denoiser.network, self.network), "quantized": (ours, theirs)}
        images = {name: [self.images(network) for network in pair] for name, pair in pairs.items()}
        differences = {name: GREY * float((a - b).abs().mean()) for name, (a, b) in images.items()}
        return [
            Check("quantized outputs", rms(y, x), 0.02, "relative"),
            Check("float images", differences["float"], 0.1, "grey levels, mean"),
            Check("quantized images", differences["quantized"], 2.0, "grey levels, mean"),
        ]

    def images(self, network: nn.Module) -> Tensor:
        """Images of a network, from noise that is the same on every device."""
        alone, predict = replace(self.denoiser, network=network), self.sampling.predictor(network)
        steps = self.sampling.trajectory(predict, alone, seed=0, stream=Stream.IMAGES, indices=range(IMAGES))
        return [step.x_next for step in steps][-1].cpu()

    def waits(self) -> list[Check]:
        """Times that the host waits for the device in the iterations of a unit; the CPU has none to wait for."""
        if self.device.type == "cpu":
            return []
        units = Blockwise()(self.structure, frozenset(self.plan.layers))
        stored = SpillAllocator(0, device=self.device, device_budget=2**30)
        captured = Capture(self.data, BATCH, stored).activations(self.network, units[1:2], with_inputs=True)
        with learned_unit(self.models[1], units[1], captured[units[1].name], recipe_of(8, BATCH), self.device) as task:
            return [Check("waits of the host in 3 iterations", counted_waits(task, len(self.data), self.device), 0, "")]


def counted_waits(task: BlockReconstruction, samples: int, device: torch.device) -> float:
    """Warnings of CUDA's debug mode for synchronizing calls, after an iteration that may wait."""
    rows = RandomRows(torch.arange(samples), BATCH, 4, seed=0).batches()
    first, *others = [[x[each.to(device)] for x in task.samples.tensors] for each in rows]
    task.iterate(first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in others:
                task.iterate(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return float(sum("synchroniz" in str(warning.message) for warning in caught))


# parts of the comparison, in the order of a quantization
CHECKS: Mapping[str, Callable[[Digits], list[Check]]] = {
    "float outputs": Digits.float_outputs,
    "weight ranges": Digits.weight_ranges,
    "GPTQ": Digits.gptq_codes,
    "learning": Digits.learning,
    "quantized outputs and images": Digits.sampled,
    "waits": Digits.waits,
}
