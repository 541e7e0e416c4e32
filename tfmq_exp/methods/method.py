"""A method is a record of choices on independent axes; a new combination is a new YAML file."""

from dataclasses import dataclass

from tfmq_exp.methods.activations import Observe
from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.quant.ranges import RangeEstimator
from tfmq_exp.surgery.plan import ScalePlan, SurgeryPlan


@dataclass(frozen=True)
class Method:
    """A post-training quantization method.

    Args:
        name: as the papers call it.
        surgery: what becomes integer, in how many bits.
        scales: which activation scales depend on the sampling step.
        weight_range: how the grid of a weight is placed.
        weights: how weights are rounded.
        activations: how activation ranges are found.
    """

    name: str
    surgery: SurgeryPlan
    scales: ScalePlan
    weight_range: RangeEstimator
    weights: RoundToNearest | Reconstruct
    activations: Observe
