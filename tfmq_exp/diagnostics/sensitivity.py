"""Sensitivity of the prediction to the quantization of single units: quantize one of them, or all but one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.diagnostics.partial_quantization import QuantizedUnit, float_units
from tfmq_exp.diagnostics.trajectory_error import Row
from tfmq_exp.finite import relative
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

THIRDS = ("first_third", "second_third", "last_third")
Progress = Callable[[float], None]


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


@torch.no_grad()
def predictions(
    model: nn.Module, data: CalibrationSet, batch: int, each_batch: Progress = lambda _: None
) -> Float[Tensor, "samples ..."]:
    """A network's prediction for every sample, without guidance; `each_batch` is called with the share that is done."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(data), batch):
        inputs = data[slice(start, start + batch)].inputs(device)
        found.append(noise_of(model(**inputs).sample, inputs["sample"]).float().cpu())
        each_batch(min(1.0, (start + batch) / len(data)))
    return torch.cat(found)


def prediction_errors(
    predicted: Float[Tensor, "samples ..."], exact: Float[Tensor, "samples ..."], step: Tensor, steps: int
) -> Row:
    """Squared error over the power of the exact prediction: of all samples, and of each third of the sampling steps.

    Args:
        predicted: predictions of the quantized network.
        exact: those of the float one.
        step: the sampling step of each sample.
        steps: number of sampling steps; a third without samples is None.

    Raises:
        NotFiniteError: predictions that are not finite, or of no power to measure an error by.
    """
    error = (predicted.double() - exact.double()).square().flatten(1).sum(1)
    power = exact.double().square().flatten(1).sum(1)
    third = step * 3 // steps

    def among(rows: Tensor) -> float | None:
        return float(relative(error[rows].sum(), power[rows].sum(), "the predictions")) if bool(rows.any()) else None

    return {"relative_error": among(third >= 0), **{name: among(third == i) for i, name in enumerate(THIRDS)}}


@dataclass(frozen=True)
class PredictionProbe:
    """Samples and the float network's predictions for them.

    Args:
        data: the samples.
        exact: the float predictions.
        steps: number of sampling steps.
        batch: samples in one forward pass.
    """

    data: CalibrationSet
    exact: Float[Tensor, "samples ..."]
    steps: int
    batch: int

    @classmethod
    def of(
        cls,
        model: QuantizedUNet,
        float_unet: nn.Module,
        units: Sequence[QuantizedUnit],
        data: CalibrationSet,
        *,
        steps: int,
        batch: int,
    ) -> "PredictionProbe":
        """Predict with the quantized network's operations, all units float: what is not quantized then differs by exactly 0."""
        with float_units(model, float_unet, units):
            return cls(data, predictions(model, data, batch), steps, batch)

    def error(self, model: nn.Module, each_batch: Progress = lambda _: None) -> Row:
        """Errors of a model's predictions."""
        predicted = predictions(model, self.data, self.batch, each_batch)
        return prediction_errors(predicted, self.exact, self.data.step, self.steps)


def unit_error(
    model: QuantizedUNet,
    float_unet: nn.Module,
    unit: QuantizedUnit,
    units: Sequence[QuantizedUnit],
    probe: PredictionProbe,
    *,
    alone: bool,
    each_batch: Progress = lambda _: None,
) -> Row:
    """Error of the network with this unit quantized and the others float, or the reverse.

    Args:
        model: the finished model, with whose weights and ranges the unit is quantized.
        float_unet: the float network.
        unit: the unit.
        units: all units.
        probe: samples and float predictions.
        alone: whether this unit alone is quantized, or all others.
        each_batch: called with the share of samples that is done.
    """
    others = [other for other in units if other is not unit]
    with float_units(model, float_unet, others if alone else [unit]):
        return probe.error(model, each_batch)
