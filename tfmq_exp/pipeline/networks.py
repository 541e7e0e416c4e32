"""The networks that images are sampled with: the float one, and the quantized one with its correction."""

import logging
from functools import cached_property
from typing import Any, Protocol

from tfmq_exp.methods.noise_correction import NoiseStatistics
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.calibrate_activations import CalibrateActivations
from tfmq_exp.pipeline.stages.fit_correction import FitCorrection
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

log = logging.getLogger(__name__)


class SampledNetwork(Protocol):
    """A network as images are sampled with it. `prefix` begins the names of the stages that sample with it."""

    prefix: str

    @property
    def inputs(self) -> dict[str, Any]:
        """Identity of the network, as a part of keys. Computes no stage."""
        ...

    def sampler(self) -> tuple[Predict, Sampling]:
        """Prediction of the noise, and the sampling that goes with it."""
        ...


class FloatNetwork:
    """The network before quantization."""

    prefix = "float "

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def inputs(self) -> dict[str, Any]:
        return {}  # those of the model say all

    def sampler(self) -> tuple[Predict, Sampling]:
        return self.run.sampling.predictor(self.run.denoiser.unet), self.run.sampling


class QuantizedNetwork:
    """The finished quantized network, with the correction of its noise if the method has one."""

    prefix = ""

    def __init__(self, run: Run, activations: CalibrateActivations, correction: FitCorrection | None) -> None:
        self.run, self.activations, self.correction = run, activations, correction

    @property
    def last_stage(self) -> Stage:
        """The stage after which images can be sampled."""
        return self.correction or self.activations

    @property
    def inputs(self) -> dict[str, Any]:
        return {"network": self.last_stage.key}

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
        return self.corrected(self.run.sampling.predictor(self.model))

    def corrected(self, predict: Predict) -> tuple[Predict, Sampling]:
        """A prediction and the sampling, both corrected by the noise statistics."""
        if self.correction is None or self.statistics is None:
            return predict, self.run.sampling
        return self.correction.correction(predict, self.run.sampling, self.statistics)
