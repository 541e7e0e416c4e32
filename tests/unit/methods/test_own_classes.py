"""Classes from outside that do not fit: refused by name, before there is work to lose."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import WeightQuantizer
from tfmq_exp.quant.scales.base import ScaleConfig, ScaleProvider
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.config import ScalePlan


@dataclass(frozen=True)
class Flat:
    """Forgets the dimensions that the ends must keep."""

    def __call__(self, x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        lo, hi = MinMax()(x, spec)
        return lo.flatten(), hi.flatten()


@dataclass(frozen=True)
class Stubborn(ScaleConfig):
    """Has no stored form."""

    def build(self, spec: QuantSpec, context: TimestepContext) -> ScaleProvider:
        return EMARange(StaticConfig(), spec)

    def tabulated(self) -> ScaleConfig:
        return self


def test_an_estimator_with_ends_of_another_shape() -> None:
    weight = torch.randn(5, 3, 2, 2)
    quantizer = WeightQuantizer(weight, QuantSpec(4, axis=0), Flat())
    with pytest.raises(ValueError, match=r"Flat must give two ends of shape \(5, 1, 1, 1\).*got \(5,\) and \(5,\)"):
        quantizer.observe(weight)


@pytest.mark.parametrize("place", ["temporal", "default"])
def test_scales_of_another_class_are_named(place: str) -> None:
    scales: dict[str, Any] = {"temporal": StaticConfig(), "default": StaticConfig(), place: {"momentum": 0.9}}
    with pytest.raises(ValueError, match=rf"scales.{place} must be a ScaleConfig, such as StaticConfig, got"):
        ScalePlan(**scales)


@pytest.mark.parametrize("place", ["temporal", "default"])
def test_scales_that_could_not_be_stored(place: str) -> None:
    scales: dict[str, ScaleConfig] = {"temporal": StaticConfig(), "default": StaticConfig(), place: Stubborn()}
    with pytest.raises(TypeError, match="a Stubborn cannot be stored; classes that can: static, per_step, "):
        ScalePlan(**scales)
