"""Sensitivity of the prediction to the quantization of single units: quantize one of them, or all but one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.diagnostics.partial_quantization import QuantizedUnit, float_units
from tfmq_exp.diagnostics.trajectory_error import Row
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
    """Predict the noise of every sample, without guidance.

    Args:
        model: the float or the quantized network.
        data: the samples.
        batch: samples of a forward pass.
        each_batch: called after each with the share of samples that is done, 0 to 1.
    """
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

    model: QuantizedUNet
    float_unet: nn.Module
    units: Sequence[QuantizedUnit]  # all of the model
    data: CalibrationSet
    steps: int  # sampling steps that the data are from
    batch: int  # samples in one forward pass

    def __post_init__(self) -> None:
        # by the quantized network's operations: where nothing is quantized the error is exactly 0
        self.exact = self._predict(self.units)

    def _predict(self, as_float: Sequence[QuantizedUnit], each_batch: Progress = lambda _: None) -> Tensor:
        with float_units(self.model, self.float_unet, as_float):
            return predictions(self.model, self.data, self.batch, each_batch)

    def error(self, as_float: Sequence[QuantizedUnit] = (), each_batch: Progress = lambda _: None) -> Row:
        """Errors with these units float; `each_batch` is called with the share of samples that is done."""
        return prediction_errors(self._predict(as_float, each_batch), self.exact, self.data.step, self.steps)

    def unit_error(self, unit: QuantizedUnit, *, alone: bool, each_batch: Progress = lambda _: None) -> Row:
        """Errors with this unit quantized and the others float (`alone`), or the reverse."""
        others = [other for other in self.units if other is not unit]
        return self.error(others if alone else [unit], each_batch)
