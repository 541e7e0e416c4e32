"""TIAR of transformers: the Temporal Information Block learns far better rounding than the nearest, on unseen conditions, too."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from tests.helpers.reconstruction import MemoryCheckpointer, RecordedProgress, compute
from tests.helpers.transformers import read_stored
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.diagnostics.temporal_error import feature_errors
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import QuantizedInputs, TemporalAware
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import build_quantized_network
from tfmq_exp.surgery.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

STEPS, PROMPTS = 20, 16
ROUNDING = LearnRounding(1e-2, 0.01, Annealing(0.2, 20.0, 2.0))
FOUR_BITS = QuantizationConfig({role.value: LayerBits(4, None) for role in Role}, AttentionBits())


def prompts(seed: int) -> dict[str, Tensor]:
    """Pooled texts of FLUX, all with its usual guidance."""
    pooled = torch.randn(PROMPTS, 10, generator=torch.Generator().manual_seed(seed))
    return {"pooled_projections": pooled, "guidance": torch.full((PROMPTS,), 3.5)}


def calibration(name: str, conditions: Mapping[str, Tensor]) -> CalibrationSet:
    """Every timestep with every condition; the noisy samples do not matter here."""
    stored = read_stored(name)
    data = stored.calibration([0])
    whole = stored.settings["timestep_dtype"] == "int64"
    t = torch.arange(STEPS) * 50 if whole else (torch.arange(1, STEPS + 1) / STEPS).float().double()
    table = {k: v[:1].repeat_interleave(PROMPTS, 0) for k, v in data.conditions.items()} | dict(conditions)
    rows = torch.arange(PROMPTS if conditions else 1).repeat(STEPS)
    t, step = (value.flip(0).repeat_interleave(len(rows) // STEPS) for value in (t, torch.arange(STEPS).flip(0)))
    x = data.x.expand(len(rows), *data.x.shape[1:])
    return replace(data, x=x, t=t, step=step, image=rows, conditions=table, condition=rows)


def errors(
    name: str, seed: int, seen: Mapping[str, Tensor], others: Mapping[str, Tensor], iterations: int
) -> list[tuple[float, float]]:
    """Relative error of the temporal features, rounded to nearest and learned, on seen and on other conditions."""
    stored, data = read_stored(name), calibration(name, seen)
    structure, network = stored.structure(), stored.network
    steps = tuple(dict.fromkeys(data.t.tolist()))
    scales = ScalePlan(StaticConfig(), StaticConfig())
    model = build_quantized_network(network, resolve(FOUR_BITS, structure, (), scales, steps), MinMax())
    unit = TemporalAware()(structure, frozenset(model.weight_layers()))[0]

    def measured(conditions: Mapping[str, Tensor]) -> float:
        return fmean(row["relative_mse"] for row in feature_errors(model, network, structure, conditions=conditions))

    model.calibrate_weights()
    with modes(model.weight_quantizers(), Mode.QUANTIZE):
        nearest = [measured(conditions) for conditions in (seen, others)]
    progress = RecordedProgress()
    checkpointer = MemoryCheckpointer()
    context = ReconstructionContext(model, network, structure, data, compute(), seed, checkpointer, progress)
    config = ReconstructionConfig(iterations, min(160, len(data)), Lp(), QuantizedInputs(), ROUNDING)
    reconstruct(context, [unit], config)
    report = checkpointer.reports[unit.name]
    assert report.error_after < report.error_before
    return list(zip(nearest, [measured(conditions) for conditions in (seen, others)], strict=True))


@pytest.mark.parametrize("name", ["pixart_sigma", "wan21"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_features_of_the_timestep_alone(name: str, seed: int) -> None:
    ((nearest, learned), _) = errors(name, seed, {}, {}, 300)
    assert 0 < learned < nearest / 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_features_of_prompts_that_were_not_calibrated(seed: int) -> None:
    seen, others = errors("flux_dev", seed, prompts(seed), prompts(seed + 100), 600)
    assert seen[1] < seen[0] / 2
    assert others[1] < others[0] / 2
