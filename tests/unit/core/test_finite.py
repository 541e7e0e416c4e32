"""A NaN or an infinity is told where it arises: in an extractor's weights, activations, losses, noise, images, features and scores."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import example_inputs, quantizable
from tests.helpers.inception import random_weights
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.core.files import write_json
from tfmq_exp.core.finite import DivergedError, NotFiniteError, naming_rates, relative, require_finite, within
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser, NoConditions
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.evaluation.features import load_inception
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
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.samplers import DDIM

pytestmark = pytest.mark.bad_input

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
WRONG = [math.nan, math.inf, -math.inf]


def test_a_message_counts_what_is_wrong() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    with pytest.raises(NotFiniteError, match=r"^x is not finite: 1 NaN and 2 infinite of 4 values$"):
        require_finite(x, "x")
    for fine in (torch.ones(3), torch.zeros(0), torch.tensor([2**40]), torch.ones(2, dtype=torch.bfloat16)):
        assert require_finite(fine, "x") is fine
    with pytest.raises(NotFiniteError, match=r"^step 3: x is not finite"), within("step 3"):
        require_finite(x, "x")


@pytest.mark.parametrize("name", ["fc.weight", "Conv2d_1a_3x3.bn.running_var", "Mixed_7c.branch1x1.conv.weight"])
def test_inception(name: str, tmp_path: Path) -> None:
    tensors = random_weights(0)
    tensors[name].view(-1)[0] = math.inf
    save_file(tensors, tmp_path / "inception.safetensors")
    with pytest.raises(ValueError, match=rf"inception\.safetensors: the weights: {name} is not finite"):
        load_inception(tmp_path / "inception.safetensors")


@pytest.mark.parametrize("scale", [0.0, -1.0, *WRONG, "0.18", True])
def test_the_scale_of_latents(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"scale factor must be a number above 0, got"):
        LatentDecoder(nn.Identity(), scale)  # type: ignore[arg-type]


def denoiser(network: nn.Module, **parts: Any) -> Denoiser:
    return Denoiser("tiny", network, (3, 8, 8), SCHEDULE, "0" * 64, **parts)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("call", [0, 2, 3])
def test_a_networks_output_at_a_step(tiny_unet: nn.Module, value: float, call: int) -> None:
    sampling, seen = Sampling(DDIM(4)), [0]

    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        eps = 0.1 * x
        if seen[0] == call:
            eps[1, 0, 0, 0] = value
        seen[0] += 1
        return eps

    t = sampling.calls(denoiser(tiny_unet))[call]
    with pytest.raises(NotFiniteError, match=rf"network's output at step {call + 1}, timestep {t} is not finite: 1 "):
        sample_shard(predict, denoiser(tiny_unet), sampling, ImagePlan(2, 0, 2), range(2))


def test_what_a_sampler_makes_of_it(tiny_unet: nn.Module) -> None:
    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return torch.full_like(x, 3e38)

    with pytest.raises(NotFiniteError, match=r"what the sampler makes of .* at step 1"):
        sample_shard(predict, denoiser(tiny_unet), Sampling(DDIM(4)), ImagePlan(2, 0, 2), range(2))


def test_float16_that_overflows_is_told_what_helps(tiny_unet: nn.Module) -> None:
    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return (1e6 * x).half().float()

    sampling = Sampling(DDIM(4), precision="float16")
    with pytest.raises(NotFiniteError, match=r"step 1.*set model\.sampling\.precision to bfloat16 or float32"):
        list(sampling.trajectory(predict, denoiser(tiny_unet), seed=0, stream="images", indices=range(2)))


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("rule", ["round", "truncate"])
def test_no_image_has_a_byte_for_it(value: float, rule: Any) -> None:
    with pytest.raises(NotFiniteError, match="images that the first stage returns"):
        to_uint8(torch.tensor([0.0, value]), rule)


def test_a_decoders_output(tiny_unet: nn.Module) -> None:
    class Broken:
        def decode(self, x: Tensor) -> Tensor:
            return x / 0 * 0

    plan = ImagePlan(1, 0, 1)
    with pytest.raises(NotFiniteError, match="images that the first stage returns"):
        sample_shard(
            lambda x, _t, _c: 0.1 * x, denoiser(tiny_unet, first_stage=Broken()), Sampling(DDIM(2)), plan, range(1)
        )


def test_a_condition(tiny_unet: nn.Module) -> None:
    class Broken(NoConditions):
        def __call__(self, choices: Any) -> Conditions:
            return Conditions({"encoder_hidden_states": torch.full((2, 5, 12), math.nan)})

    with pytest.raises(NotFiniteError, match="the condition encoder_hidden_states is not finite"):
        Sampling(DDIM(2)).conditions(denoiser(tiny_unet, encoder=Broken()), 0, "images", [0, 1])


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
