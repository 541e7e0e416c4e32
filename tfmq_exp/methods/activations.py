"""How activation quantizers get their ranges."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class Observe:
    """Show the calibration set to all quantizers at once, with weights already integer and activations still float.

    Batches are drawn from all sampling steps: a range shared by all steps needs that (in the order of the trajectory its
    moving average would forget the early steps), and the temporal features' ranges are exact either way. Where every range
    belongs to one step, the steps stay together, which gives each range the most samples per observation.

    Args:
        batch: samples that one observation is made of.
    """

    batch: int

    @torch.no_grad()
    def __call__(
        self, model: QuantizedUNet, data: CalibrationSet, seed: int, each_batch: Callable[[int], None] = lambda _: None
    ) -> None:
        """Set all ranges and switch the quantizers on. `each_batch` is told how many samples are done."""
        if not all(quantizer.source.per_step for quantizer in model.activation_quantizers().values()):
            data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
        device = next(model.parameters()).device
        model.set_activations(Mode.OBSERVE)
        for start in range(0, len(data), self.batch):
            part = data[slice(start, start + self.batch)]
            model(**part.inputs(device))
            each_batch(start + len(part))
        model.set_activations(Mode.QUANTIZE)
