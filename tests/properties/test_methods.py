"""What methods make of whole networks: through the file and back, mixed widths, stored features, split shortcuts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tests.helpers.sampling import output, reloaded
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.generator import Frequency, Normalised
from tfmq_exp.quant.scales.observed_ranges import EMARange, TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig, TDQScale
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, ScalePlan

INTERVALS = TimestepGroupConfig(2, 1000)
GENERATED = TDQConfig(Frequency(32), (16, 16), 0.2, "default")
THIN = TDQConfig(Normalised(1000), (16, 16), 0.0, "default", seed=1)
CHOSEN = (4, 8, 8, 4)
VARIANTS: dict[str, dict[str, Any]] = {
    "split": {"split": True},
    "outputs": {"output": 8},
    "outputs alone": {"activation": None, "output": 6},
    "operands": {"attention": AttentionBits(8, 16)},
    "operands per step": {"attention": AttentionBits(6, 8), "scales": "all"},
    "intervals": {"scales": ScalePlan(INTERVALS, INTERVALS)},
    "dynamic per sample": {"scales": ScalePlan(DynamicConfig("sample"), DynamicConfig("sample"))},
    "dynamic per tensor": {"scales": ScalePlan(DynamicConfig("tensor"), DynamicConfig("tensor"))},
    "generated": {"scales": ScalePlan(GENERATED, GENERATED)},
    "thin": {"scales": ScalePlan(THIN, THIN)},
    "two widths": {"activation": (4, 8)},
    "everything": {
        "split": True,
        "activation": (8, 4),
        "output": (4, 8),
        "attention": AttentionBits(8, 8),
        "scales": ScalePlan(GENERATED, INTERVALS),
    },
}


FAMILIES = [("tiny_unet", variant) for variant in VARIANTS] + [
    ("tiny_conditional_unet", variant) for variant in ("split", "outputs", "operands", "everything")
]
Plain = tuple[nn.Module, dict[str, Any], Tensor]


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> Plain:
    """A network, inputs, and what its usual quantized twin returns."""
    network = request.getfixturevalue(request.param)
    inputs = example_inputs(network, 2 * TIMESTEPS, seed=5)
    return network, inputs, output(calibrated(quantizable(network)), inputs)


@pytest.mark.parametrize(("plain", "variant"), FAMILIES, indirect=["plain"])
def test_loaded_model_is_bit_equal(plain: Plain, tmp_path: Path, variant: str) -> None:
    network, inputs, usual = plain
    model = calibrated(quantizable(network, **VARIANTS[variant]))
    before = output(model, inputs)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(output(loaded, inputs), before)
    assert loaded.plan == model.plan
    assert loaded.integers.keys() == model.integers.keys()
    for each in (model, loaded):
        each.use_bits(CHOSEN)
    after = output(loaded, inputs)
    assert torch.equal(after, output(model, inputs))
    assert torch.equal(after, before) is not bool(model.switches())
    assert not torch.equal(after, usual)
    serialization.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scale", [GENERATED, THIN])
def test_merging_leaves_tables_and_no_network(tiny_unet: nn.Module, tmp_path: Path, scale: TDQConfig) -> None:
    model = calibrated(quantizable(tiny_unet, scales=ScalePlan(scale, scale)))
    assert all(isinstance(quantizer.scale_provider, TDQScale) for quantizer in model.activation_quantizers().values())
    quantizers = model.activation_quantizers().items()
    tables = {name: quantizer.scale_provider.table() for name, quantizer in quantizers}  # type: ignore[operator]
    loaded = reloaded(model, tmp_path)
    for name, quantizer in loaded.activation_quantizers().items():
        assert type(quantizer.scale_provider) is EMARange
        assert quantizer.scale_provider.per_step
        assert torch.equal(quantizer.scale_provider.scale, tables[name].scale)
        assert torch.equal(quantizer.scale_provider.zero_point, tables[name].zero_point)
        assert len(quantizer.scale_provider.scale.unique()) == len(TIMESTEPS)
    assert not any("mlp" in key for key in serialization.read(tmp_path / "model.safetensors")[1])


def test_networks_of_scales_cannot_be_stored(tiny_unet: nn.Module, tmp_path: Path) -> None:
    model = calibrated(quantizable(tiny_unet, scales=ScalePlan(GENERATED, GENERATED)))
    with pytest.raises(TypeError, match="a TDQConfig cannot be stored"):
        serialization.save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_one_width_at_all_steps_is_the_model_of_that_width(network: nn.Module, bits: int) -> None:
    inputs, model = example_inputs(network, 2 * TIMESTEPS, seed=5), calibrated(quantizable(network, activation=(4, 8)))
    assert model.activation_bits() == (4, 8)
    model.use_bits([bits] * len(TIMESTEPS))
    assert torch.equal(output(model, inputs), output(calibrated(quantizable(network, activation=bits)), inputs))


def test_every_row_has_the_width_of_its_step(network: nn.Module) -> None:
    # in double precision, where the batch size moves no activation across the middle between two integers
    model = calibrated(quantizable(network, activation=(4, 8))).double()
    pure = {bits: calibrated(quantizable(network, activation=bits)).double() for bits in (4, 8)}
    model.use_bits(CHOSEN)
    inputs = example_inputs(network, (501, 1, 751, 501, 251))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    together = output(model, inputs)
    for row, t in enumerate(inputs["timestep"].tolist()):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        bits = CHOSEN[TIMESTEPS.index(t)]
        torch.testing.assert_close(together[row : row + 1], output(pure[bits], alone), atol=1e-12, rtol=0)
        assert not torch.allclose(together[row : row + 1], output(pure[12 - bits], alone), atol=1e-4)


def test_unknown_width_of_a_model_is_named(tiny_unet: nn.Module) -> None:
    model = quantizable(tiny_unet, activation=(4, 8))
    with pytest.raises(ValueError, match="no quantizer has 6 bits; there are 4, 8"):
        model.use_bits((4, 6, 8, 8))
    assert quantizable(tiny_unet).activation_bits() == ()
