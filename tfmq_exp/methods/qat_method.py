"""The phase that trains weights and activation ranges together, the whole network at once, on images."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tfmq_exp.methods.activations import CalibrationBudget
from tfmq_exp.qat.conditioning import Labels
from tfmq_exp.qat.module import TrainingProtocol
from tfmq_exp.qat.train import TrainingContext, train


@dataclass(frozen=True)
class QuantizationAwareTrain:
    """Quantization-aware training: the denoiser's own training goes on, with quantizers in the network (TDQ, arXiv 2306.02316).

    Args:
        protocol: iterations, batch, learning rates, loss.
        labels: classes or captions of the training images, for conditional networks.
    """

    protocol: TrainingProtocol
    labels: Labels
    learns: ClassVar[frozenset[str]] = frozenset({"weights", "activations"})
    trains: ClassVar[Literal[True]] = True

    def budget(self, images: int, calls: int) -> CalibrationBudget:
        """Training images, counted as often as they are seen, and iterations."""
        return CalibrationBudget(self.protocol.batch * self.protocol.iterations, self.protocol.iterations)

    def __call__(self, context: TrainingContext) -> None:
        train(context, self.protocol)
