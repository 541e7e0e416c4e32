"""A method: a record of choices on independent axes; a new combination is a new YAML file."""

from dataclasses import dataclass

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.methods.activations import CalibrateRanges, KeepRanges, LearnRanges
from tfmq_exp.methods.noise_correction import NoCorrection, NoiseCorrection
from tfmq_exp.methods.qat_method import QuantizationAwareTrain
from tfmq_exp.methods.temporal_features import CacheFeatures, ComputeFeatures
from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.quant.observers import Observer
from tfmq_exp.surgery.config import QuantizationConfig, ScalePlan


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Args:
        name: as the papers call it.
        surgery: layers and operands that become integer, with their bits.
        scales: how activation scales are computed.
        weight_observer: observer that finds the range of a weight.
        timesteps: points of the trajectory that are learned from; weights and activations refer to it.
        weights: how weights are rounded.
        activations: how activation ranges are found.
        temporal: how temporal features are computed.
        correction: how the remaining quantization noise is corrected.
    """

    name: str
    surgery: QuantizationConfig
    scales: ScalePlan
    weight_observer: Observer
    timesteps: TimestepPolicy
    weights: RoundToNearest | Reconstruct | QuantizationAwareTrain
    activations: CalibrateRanges | LearnRanges | KeepRanges
    temporal: ComputeFeatures | CacheFeatures
    correction: NoCorrection | NoiseCorrection
