"""Which units the prediction's error comes from: quantize one of them, or all but one, and look at the prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.diagnostics.partial_quantization import QuantizedPart, all_float
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

THIRDS = ("first_third", "second_third", "last_third")
Row = dict[str, Any]


def spread_over_steps(data: CalibrationSet, samples: int, seed: int) -> CalibrationSet:
    """At most so many samples of whole trajectories, as many from each sampling step as from any other, give or take one.

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
    model: nn.Module, data: CalibrationSet, batch: int, each_batch: Callable[[float], None] = lambda _: None
) -> Float[Tensor, "samples ..."]:
    """What a network says of every sample, without guidance; `each_batch` is told the share that is done."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(data), batch):
        inputs = data[slice(start, start + batch)].inputs(device)
        found.append(noise_of(model(**inputs).sample, inputs["sample"]).float().cpu())
        each_batch(min(1.0, (start + batch) / len(data)))
    return torch.cat(found)


def prediction_errors(
    found: Float[Tensor, "samples ..."], wanted: Float[Tensor, "samples ..."], step: Tensor, steps: int
) -> Row:
    """Squared error over the power of what was wanted: of all samples, and of those from each third of the sampling steps.

    A third that has no samples is None.

    Raises:
        NotFiniteError: predictions that are not finite, or of no power to measure an error by.
    """
    error = (found.double() - wanted.double()).square().flatten(1).sum(1)
    power = wanted.double().square().flatten(1).sum(1)
    third = step * 3 // steps

    def among(rows: Tensor) -> float | None:
        whole = relative(error[rows].sum(), power[rows].sum(), "the predictions") if bool(rows.any()) else None
        return None if whole is None else float(whole)

    parts = {name: among(third == i) for i, name in enumerate(THIRDS)}
    return {"relative_error": among(third >= 0), **parts}


@dataclass(frozen=True)
class PredictionProbe:
    """Samples, what the float network says of them, how many sampling steps they are from, and how many pass together."""

    data: CalibrationSet
    wanted: Float[Tensor, "samples ..."]
    steps: int
    batch: int

    @classmethod
    def of(
        cls,
        model: QuantizedUNet,
        float_unet: nn.Module,
        parts: Sequence[QuantizedPart],
        data: CalibrationSet,
        *,
        steps: int,
        batch: int,
    ) -> "PredictionProbe":
        """The float network by the quantized one's operations: a unit with nothing quantized differs by exactly 0."""
        with all_float(model, float_unet, parts):
            return cls(data, predictions(model, data, batch), steps, batch)

    def error(self, model: nn.Module, each_batch: Callable[[float], None] = lambda _: None) -> Row:
        """Of the model as it stands."""
        found = predictions(model, self.data, self.batch, each_batch)
        return prediction_errors(found, self.wanted, self.data.step, self.steps)


def unit_error(
    model: QuantizedUNet,
    float_unet: nn.Module,
    part: QuantizedPart,
    parts: Sequence[QuantizedPart],
    yardstick: PredictionProbe,
    *,
    alone: bool,
    each_batch: Callable[[float], None] = lambda _: None,
) -> Row:
    """Error of the network with this unit quantized and the others float, or (not `alone`) the other way around.

    Args:
        model: the finished model; the unit's weights and ranges are what they are there.
        float_unet: the float network.
        part: the unit.
        parts: all units.
        yardstick: what is compared.
        alone: whether the unit alone is quantized.
        each_batch: told the share of samples that is done.
    """
    others = [other for other in parts if other is not part]
    with all_float(model, float_unet, others if alone else [part]):
        return yardstick.error(model, each_batch)
