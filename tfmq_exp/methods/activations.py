"""How activation quantizers get their ranges."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class Observe:
    """Show the calibration set to all quantizers at once, with weights already integer and activations still float.

    Args:
        batch: samples that one observation is made of.
        order: `mixed` draws every batch from all sampling steps, which a range shared by all steps needs (in the order of
            the trajectory its moving average would forget the early steps); `by_step` keeps steps together, which gives
            per-step ranges of image-dependent activations the most samples per observation.
    """

    batch: int
    order: Literal["mixed", "by_step"] = "mixed"

    def __post_init__(self) -> None:
        if self.order not in ("mixed", "by_step"):
            raise ValueError(f"order must be mixed or by_step, got {self.order!r}")

    @torch.no_grad()
    def __call__(
        self, model: QuantizedUNet, data: CalibrationSet, seed: int, each_batch: Callable[[int, int], None]
    ) -> None:
        """Set all ranges and switch the quantizers on. `each_batch` is told how many samples are done, of how many."""
        if self.order == "mixed":
            data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
        device = next(model.parameters()).device
        model.set_activations(Mode.OBSERVE)
        for start in range(0, len(data), self.batch):
            part = data[slice(start, start + self.batch)]
            model(**part.inputs(device))
            each_batch(start + len(part), len(data))
        model.set_activations(Mode.QUANTIZE)
