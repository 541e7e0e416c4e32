"""A method is a record of choices on independent axes; a new combination is a new YAML file."""

from dataclasses import dataclass

from tfmq_exp.calibration.timesteps import TimestepPolicy
from tfmq_exp.methods.activations import CalibrateRanges, KeepRanges, LearnRanges
from tfmq_exp.methods.noise_correction import NoCorrection, NoiseCorrection
from tfmq_exp.methods.qat_method import QuantizationAwareTrain
from tfmq_exp.methods.temporal_features import CacheFeatures, ComputeFeatures
from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.quant.observers import Observer
from tfmq_exp.surgery.config import QuantizationConfig
from tfmq_exp.surgery.scales import ScalePlan


@dataclass(frozen=True)
class Method:
    """A post-training quantization method.

    Args:
        name: as the papers call it.
        surgery: what becomes integer, in how many bits.
        scales: where activation scales come from.
        weight_observer: how the grid of a weight is placed.
        timesteps: which points of the trajectory are learned from; weights and activations refer to it.
        weights: how weights are rounded.
        activations: how activation ranges are found.
        temporal: how temporal features come about.
        correction: what is done about the noise that remains.
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
