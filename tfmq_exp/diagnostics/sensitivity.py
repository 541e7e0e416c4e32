"""Sensitivity of the prediction to the quantization of single units: quantize one of them, or all but one."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.denoisers.structure import Kind, NetworkStructure
from tfmq_exp.diagnostics.rows import Row
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers import Mode, Quantizer, modes
from tfmq_exp.reconstruction.units import TemporalAware
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

THIRDS = ("first_third", "second_third", "last_third")
Progress = Callable[[float], None]


@dataclass(frozen=True)
class QuantizedUnit:
    """A unit of the network: its layers, and the attentions inside it whose operands are quantized."""

    name: str
    kind: Kind
    layers: tuple[str, ...]
    attentions: tuple[str, ...]


def quantized_units(
    model: QuantizedNetwork, float_network: nn.Module, structure: NetworkStructure
) -> list[QuantizedUnit]:
    """The units with anything quantized in them, in execution order, the Temporal Information Block first.

    That block is one unit whatever the method learns together: where its features are stored, the time embedding is gone,
    and no projection could be made float by itself.
    """

    def replaced(layer: str) -> bool:
        return type(model.network.get_submodule(layer)) is not type(float_network.get_submodule(layer))

    units: list[QuantizedUnit] = []
    for unit in TemporalAware()(structure, frozenset(structure.layers)):
        attentions = tuple(a for a in model.plan.operands if a == unit.name or a.startswith(f"{unit.name}."))
        if attentions or any(replaced(layer) for layer in unit.layers):
            units.append(QuantizedUnit(unit.name, unit.kind, unit.layers, attentions))
    return units


@contextmanager
def float_units(model: QuantizedNetwork, float_network: nn.Module, units: Collection[QuantizedUnit]) -> Generator[None]:
    """Make units float for the duration of a block.

    A quantized layer gets the float weight and its quantizers are off, but still run their hooks; a module in the place of
    a layer (a stored feature) is exchanged for the layer. No memory is taken: weights are those of `float_unet`.
    """
    network, before = (
        model.network,
        [(layer, model.network.get_submodule(layer)) for unit in units for layer in unit.layers],
    )
    quantized = [(layer, module, module.weight) for layer, module in before if isinstance(module, QuantLayer)]
    exchanged = [(layer, module) for layer, module in before if not isinstance(module, QuantLayer)]
    attentions = [f"{name}.processor." for unit in units for name in unit.attentions]
    prefixes = *(f"{layer}." for layer, _ in before), *attentions
    quantizers = [m for name, m in network.named_modules() if isinstance(m, Quantizer) and name.startswith(prefixes)]
    try:
        for layer, module, _ in quantized:
            module.weight = nn.Parameter(float_network.get_parameter(f"{layer}.weight"), requires_grad=False)
        for layer, _ in exchanged:
            network.set_submodule(layer, float_network.get_submodule(layer))
        with modes(quantizers, Mode.OFF):
            yield
    finally:
        for _, module, weight in quantized:
            module.weight = weight
        for layer, module in exchanged:
            network.set_submodule(layer, module)


def spread_over_steps(data: CalibrationSet, samples: int, seed: int) -> CalibrationSet:
    """Draw at most so many samples of whole trajectories, equally many of each sampling step, give or take one.

    Where they are fewer than steps, the steps are evenly spaced.
    """
    steps = data.step.unique()
    count = min(samples, len(data))
    taken = torch.bincount(torch.arange(count) * len(steps) // count, minlength=len(steps))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rows = [order[data.step[order] == step][:n] for step, n in zip(steps, taken.tolist(), strict=True)]
    return data[torch.cat(rows)]


def prediction_errors(
    predicted: Float[Tensor, "samples ..."], exact: Float[Tensor, "samples ..."], step: Tensor, steps: int
) -> Row:
    """Squared error over the power of the exact prediction: of all samples, and of each third of the sampling steps.

    `step` is the sampling step of each sample, of so many `steps`; a third without samples is None.
    """
    error = (predicted.double() - exact.double()).square().flatten(1).sum(1)
    power = exact.double().square().flatten(1).sum(1)
    third = step * 3 // steps

    def among(rows: Tensor) -> float | None:
        return float(relative(error[rows].sum(), power[rows].sum(), "the predictions")) if bool(rows.any()) else None

    return {"relative_error": among(third >= 0), **{name: among(third == i) for i, name in enumerate(THIRDS)}}


@dataclass
class PredictionProbe:
    """Prediction errors of a quantized network with some of its units float."""

    model: QuantizedNetwork
    float_network: nn.Module
    units: Sequence[QuantizedUnit]  # all of the model
    data: CalibrationSet
    steps: int  # sampling steps that the data are from
    batch: int  # samples in one forward pass

    def __post_init__(self) -> None:
        # by the quantized network's operations: where nothing is quantized the error is exactly 0
        self.exact = self.predictions(self.units)

    @torch.no_grad()
    def predictions(
        self, as_float: Sequence[QuantizedUnit], each_batch: Progress = lambda _: None
    ) -> Float[Tensor, "samples ..."]:
        """Noise predicted for every sample, without guidance; `each_batch` is called with the share that is done."""
        device, found = next(self.model.parameters()).device, []
        with float_units(self.model, self.float_network, as_float):
            for start in range(0, len(self.data), self.batch):
                inputs = self.data[slice(start, start + self.batch)].inputs(device)
                found.append(noise_of(self.model(**inputs).sample, inputs[self.data.first_argument]).float().cpu())
                each_batch(min(1.0, (start + self.batch) / len(self.data)))
        return torch.cat(found)

    def error(self, as_float: Sequence[QuantizedUnit] = (), each_batch: Progress = lambda _: None) -> Row:
        """Errors with these units float; `each_batch` is called with the share of samples that is done."""
        return prediction_errors(self.predictions(as_float, each_batch), self.exact, self.data.step, self.steps)

    def unit_error(self, unit: QuantizedUnit, *, alone: bool, each_batch: Progress = lambda _: None) -> Row:
        """Errors with this unit quantized and the others float (`alone`), or the reverse."""
        return self.error([other for other in self.units if other is not unit] if alone else [unit], each_batch)
