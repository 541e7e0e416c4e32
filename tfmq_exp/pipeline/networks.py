"""Networks that images are sampled with, and the quantized one with its correction."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tfmq_exp.methods.noise_correction import NoiseStatistics
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.calibrate_activations import CalibrateActivations
from tfmq_exp.pipeline.stages.fit_correction import FitCorrection
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledNetwork:
    """A network as images are sampled with it.

    Args:
        prefix: begins the names of the stages that sample with it.
        stage: that makes it; None for the float network.
        sampler: gives the prediction of the noise and the sampling that goes with it.
    """

    prefix: str
    stage: Stage | None
    sampler: Callable[[], tuple[Predict, Sampling]]

    @property
    def inputs(self) -> dict[str, Any]:
        """Identity of the network beyond that of the float model, as a part of keys."""
        return {"network": self.stage.key} if self.stage else {}


@dataclass(eq=False)
class QuantizedNetwork:
    """The finished quantized network, with the correction of its noise if the method has one."""

    sampling: Sampling
    activations: CalibrateActivations
    correction: FitCorrection | None

    @property
    def stage(self) -> Stage:
        """The last stage that makes it."""
        return self.correction or self.activations

    @cached_property
    def statistics(self) -> NoiseStatistics | None:
        """Noise statistics, for methods that correct it."""
        return self.correction.statistics() if self.correction else None

    @cached_property
    def model(self) -> QuantizedUNet:
        """The network with the activation bits of every step chosen."""
        model = self.activations.model
        if self.statistics is not None and self.statistics.bits:
            model.use_bits(self.statistics.bits)
        elif widths := model.activation_bits():
            log.warning("nothing chooses between %s activation bits: %d at every step", widths, widths[-1])
        return model

    def sampler(self) -> tuple[Predict, Sampling]:
        """Prediction and sampling, both corrected."""
        return self.corrected(self.sampling.predictor(self.model.for_timesteps(self.activations.run.calls)))

    def corrected(self, predict: Predict) -> tuple[Predict, Sampling]:
        """A prediction of this network, and the sampling, both corrected by the noise statistics."""
        if self.correction is None or self.statistics is None:
            return predict, self.sampling
        return self.correction.correction(predict, self.sampling, self.statistics)
