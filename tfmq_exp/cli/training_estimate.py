"""What training with quantizers in the network will take: a step of a few rows is measured, the rest is reckoned."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.cli.measure import ITERATION, Clock, rows_for
from tfmq_exp.qat.module import TrainingProtocol
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

COPIES = 5  # of what is learned, beside the network: its average, two moments, the gradient, and that as one vector


@dataclass(frozen=True)
class TrainingCourse:
    """A training, read as the learning of units is by the estimate.

    Args:
        iterations: that are left.
        rows: of a batch that go through the network together.
        parts: of a batch.
        row: seconds of a row, forwards and backwards.
        kept: bytes that a row keeps for the way back.
        learned: bytes of all that is learned.
    """

    iterations: int
    rows: int
    parts: int
    row: float
    kept: int
    learned: int
    samples: int = 0  # of a calibration set

    def seconds(self, cache: int, slower: float) -> float:
        """All of it. Nothing is cached, and activations were quantized while it was measured."""
        return self.iterations * self.parts * self.rows * self.row

    def cached(self, cache: int) -> tuple[int, int]:
        """Nothing, in memory or on disk."""
        return 0, 0

    def working(self) -> int:
        """Bytes beside the network."""
        return COPIES * self.learned + self.rows * self.kept


def measure_training(
    model: QuantizedUNet, data: CalibrationSet, protocol: TrainingProtocol, done: int, forward: float, now: Clock
) -> TrainingCourse:
    """Take a step of some rows.

    Args:
        model: quantizing.
        data: as many rows as a part of a batch has.
        protocol: of the training.
        done: iterations that an interrupted attempt has left behind.
        forward: seconds of a row through the float network.
        now: what seconds are counted with.
    """
    device = next(model.parameters()).device
    part = -(-protocol.batch // protocol.parts)
    few = data[slice(0, rows_for(4 * forward, ITERATION, part))].inputs(device)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    saved: dict[int, int] = {}

    def noted(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.nbytes
        return x

    def step() -> None:
        loss: Any = model(**few).sample.float().square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x):
            step()
        began = now()
        step()
        seconds = now() - began
    for parameter in parameters:
        parameter.requires_grad_(False)
    rows, learned = len(few["sample"]), sum(p.nbytes for p in parameters)
    activations = max(0, sum(saved.values()) - learned)
    left = protocol.iterations - done
    return TrainingCourse(left, part, protocol.parts, seconds / rows, activations // rows, learned)
