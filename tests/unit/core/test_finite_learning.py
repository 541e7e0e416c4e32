"""A NaN or an infinity in calibration, learning, and what is stored."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import example_inputs, quantizable
from tests.unit.core.test_finite import WRONG
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.core.files import write_json
from tfmq_exp.core.finite import DivergedError, NotFiniteError, naming_rates, relative, within
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.methods.noise_correction import NoiseCorrection
from tfmq_exp.methods.noise_statistics import NoiseMoments
from tfmq_exp.quant.histogram_observers import EntropyObserver, HistogramPercentileObserver
from tfmq_exp.quant.observers import (
    AbsMax,
    Constant,
    LpObserver,
    LSQInit,
    MeanStd,
    MinMax,
    Observer,
    Percentile,
    SymmetricMSEObserver,
)
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.module import LearnRounding, LearnScales, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import FloatInputs

pytestmark = pytest.mark.bad_input

OBSERVERS: list[tuple[Observer, str]] = [
    *(
        (observer, "affine")
        for observer in (MinMax(), MinMax(include_zero=False), SymmetricMSEObserver(), LpObserver())
    ),
    *(
        (observer, "affine")
        for observer in (LpObserver(include_zero=False), EntropyObserver(), HistogramPercentileObserver())
    ),
    *((observer, "symmetric") for observer in (LSQInit(), AbsMax(), Percentile(), MeanStd(), Constant(3.0, 6.0))),
]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize(("observer", "scheme"), OBSERVERS, ids=lambda x: type(x).__name__)
def test_a_range_is_not_taken_of_it(observer: Observer, scheme: Any, value: float) -> None:
    source = EMARange(StaticConfig(observer=observer), QuantSpec(8, scheme))
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    source.observe(x)
    before = copy.deepcopy(source.state_dict())
    x[2, 1, 0, 0] = value
    with pytest.raises(NotFiniteError, match="the range of an activation is not finite"):
        source.observe(x)
    assert all(torch.equal(source.state_dict()[name], old) for name, old in before.items())


def test_calibration_names_layer_and_timestep(network: nn.Module) -> None:
    model = quantizable(network)
    name = model.weight_layers()[len(model.weight_layers()) // 2]
    data = example_inputs(network, 2 * model.context.timesteps)
    layer = model.network.get_submodule(name)

    def spoil(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[model.context.t == 501] = math.nan
        return (x,)

    layer.register_forward_pre_hook(spoil)
    conditions = {name: value for name, value in data.items() if name == "encoder_hidden_states"}
    steps = torch.arange(8) % 4
    samples = CalibrationSet(data["sample"], data["timestep"], steps, torch.arange(8) // 4, conditions)
    with pytest.raises(NotFiniteError, match=rf"^{name}\.input_quantizer at timesteps 501: the range of an activation"):
        CalibrateRanges(8, EveryKth(1))(task_of(model, samples))


def task_of(model: Any, data: CalibrationSet) -> Any:
    """All of a task that ranges are taken with."""

    class Watcher:
        def on_progress(self, *_: Any) -> None:
            pass

    class Task:
        pass

    task: Any = Task()
    task.model, task.data, task.seed, task.progress, task.stored = model, data, 0, Watcher(), None
    return task


def test_a_weight_without_a_range_is_named(tiny_unet: nn.Module) -> None:
    model = quantizable(tiny_unet)
    layer = model.weight_layers()[3]
    model.layer(layer).weight.data.view(-1)[0] = math.inf
    with pytest.raises(NotFiniteError, match=f"^the weight of {layer}: a range of MinMax is not finite"):
        model.calibrate_weights()


def test_scales_that_learning_has_spoiled_are_named(tiny_unet: nn.Module) -> None:
    model = quantizable(tiny_unet)
    quantizers: dict[str, Any] = dict(model.activation_quantizers())
    name, quantizer = list(quantizers.items())[2]
    for other in quantizers.values():
        other.scale_provider.observe(
            torch.randn(1, 3)
        ) if not other.scale_provider.per_step else other.scale_provider.scale.fill_(1.0)
        other.scale_provider.zero_point.nan_to_num_()
    quantizer.scale_provider.scale.fill_(math.inf)
    with pytest.raises(NotFiniteError, match=f"scale of {name} after learning is not finite"):
        model.tabulate_scales()


@pytest.mark.parametrize("value", WRONG)
def test_what_units_learn_from(value: float) -> None:
    batch = (torch.arange(4), torch.randn(4, 3), {"context": torch.randn(4, 2)})
    stored = TensorTree.like(batch, 8, SpillAllocator(2**20))
    stored.write(0, batch)
    batch[2]["context"][1, 0] = value
    with pytest.raises(NotFiniteError, match="a tensor on the calibration set"):
        stored.write(4, batch)


def test_a_diverged_loss_names_the_rates_to_lower() -> None:
    rounding = LearnRounding(0.01, 0.01, Annealing(0.2, 20.0, 2.0))
    recipe = ReconstructionConfig(5, 2, Lp(), FloatInputs(), rounding, LearnScales(4e-4))
    with pytest.raises(DivergedError) as error, naming_rates("method.weights"), within("not added"):
        raise DivergedError("the unit mid_block", 10, 300, math.nan, recipe.learning_rates)
    assert str(error.value) == (
        "the unit mid_block diverged: its loss is nan at iteration 10 of 300; lower "
        "method.weights.recipe.rounding.learning_rate (now 0.01) or "
        "method.weights.recipe.scales.learning_rate (now 0.0004)"
    )


def test_noise_that_is_corrected() -> None:
    correction = NoiseCorrection(5, "channel", "residual", "pooled", True)
    e, d = torch.randn(2, 3, 4, 2, 6, 6, dtype=torch.float64).unbind()
    correction.estimate(NoiseMoments.of(e, d), (901, 501, 1))
    d[1, 0, 0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="the quantization noise at timestep 501, squared, is not finite"):
        correction.estimate(NoiseMoments.of(e, d), (901, 501, 1))


@pytest.mark.parametrize("value", WRONG)
def test_no_file_has_it(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json would hold a number that is not finite"):
        write_json(tmp_path / "results.json", {"rows": [{"scores": {"fid": value}}]})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "results.json", {"fid": 1.5})
    assert json.loads((tmp_path / "results.json").read_text()) == {"fid": 1.5}


def test_relative_errors() -> None:
    error, size = torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])
    assert relative(error, size, "x").tolist() == [0.0, 0.0, 0.75]
    for wrong in ((1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(NotFiniteError, match="the relative error of x"):
            relative(torch.tensor(wrong[0]), torch.tensor(wrong[1]), "x")
