"""A method: a record of choices on independent axes; a new combination is a new YAML file."""

from dataclasses import dataclass

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.methods.activations import CalibrateRanges, KeepRanges, LearnRanges
from tfmq_exp.methods.noise_correction import NoCorrection, NoiseCorrection
from tfmq_exp.methods.temporal_features import BasisFeatures, CacheFeatures, ComputeFeatures
from tfmq_exp.methods.weights import QuantizationAwareTrain, Reconstruct, RoundToNearest
from tfmq_exp.quant.observers import Observer
from tfmq_exp.surgery.config import QuantizationConfig, ScalePlan


@dataclass(frozen=True)
class Method:
    """A quantization method."""

    name: str  # as the papers call it
    surgery: QuantizationConfig  # layers and operands that become integer, with their bits
    scales: ScalePlan  # how activation scales are computed
    weight_observer: Observer  # observer that finds the range of a weight
    timesteps: TimestepPolicy  # points of the trajectory that are learned from; weights and activations refer to it
    weights: RoundToNearest | Reconstruct | QuantizationAwareTrain  # how weights are rounded
    activations: CalibrateRanges | LearnRanges | KeepRanges  # how activation ranges are found
    temporal: ComputeFeatures | CacheFeatures | BasisFeatures  # how temporal features are computed
    correction: NoCorrection | NoiseCorrection  # how the remaining quantization noise is corrected
