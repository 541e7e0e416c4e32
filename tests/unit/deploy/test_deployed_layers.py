"""The table of layers: what fits and what does not."""

import pytest
import torch
from torch import nn

from tests.conftest import TIMESTEPS
from tests.helpers.deployed import model_of
from tfmq_exp.deploy.activation_tables import RuntimeScale, ScaleTable, activation_scale, varies
from tfmq_exp.deploy.layers import deployed_layers, layer_report
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.generator import Normalised
from tfmq_exp.quant.scales.observed_ranges import StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.quant.spec import QParams
from tfmq_exp.surgery.config import LayerBits, ScalePlan


def test_every_layer_has_a_line_and_a_reason_where_it_stays_float(tiny_unet: nn.Module) -> None:
    plain, weight_only = "conv_out", "conv_in"
    model = model_of(
        tiny_unet, sites={plain: LayerBits(), weight_only: LayerBits(8, None), "mid_block.*": LayerBits(None, 8)}
    )
    layers = [name for name, m in tiny_unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    rows = {str(row["layer"]): row for row in layer_report(model, deployed_layers(model))}
    assert list(rows) == layers
    assert rows[plain]["why"] == "it is not quantized"
    assert rows[weight_only]["why"] == "its input is not quantized"
    for name, row in rows.items():
        if name.startswith("mid_block."):
            assert row["why"] == "its weight is not quantized"
        elif name not in (plain, weight_only):
            assert (row["executed"], row["why"], row["weight_bits"]) == ("int8", "", "4")


def test_split_shortcuts_are_two_products(tiny_unet: nn.Module) -> None:
    layers = {layer.name: layer for layer in deployed_layers(model_of(tiny_unet, split=True))}
    shortcut = layers["up_blocks.0.resnets.0.conv_shortcut"]
    assert shortcut.integer
    assert sum(product.channels for product in shortcut.products) == shortcut.layer.weight.shape[1]
    assert len(shortcut.products) == 2


def test_a_zero_point_that_is_no_integer_is_named(tiny_unet: nn.Module) -> None:
    model = model_of(tiny_unet)
    integers = model.integers["conv_in"][0]
    moved = QParams(integers.qparams.scale, integers.qparams.zero_point + 0.25)
    model.freeze("conv_in", (integers._replace(qparams=moved),))
    row = next(layer for layer in deployed_layers(model) if layer.name == "conv_in")
    assert not row.integer
    assert "is no integer" in row.why


SCALES = {
    "static": StaticConfig(),
    "intervals": TimestepGroupConfig(2, 1000),
    "dynamic": DynamicConfig("sample"),
}


@pytest.mark.parametrize("kind", SCALES)
def test_a_grid_is_what_the_quantizer_uses(tiny_unet: nn.Module, kind: str) -> None:
    model = model_of(tiny_unet, scales=ScalePlan(SCALES[kind], SCALES[kind]))
    quantizer = model.layer("conv_in").input_quantizer
    grid = activation_scale(quantizer, len(TIMESTEPS))
    x = torch.randn(len(TIMESTEPS), 3, 8, 8)
    with model.context.at(torch.tensor(TIMESTEPS)):
        expected = quantizer(x)
    if kind == "dynamic":
        assert isinstance(grid, RuntimeScale)
        return
    assert isinstance(grid, ScaleTable)
    scale, zero_point = grid.scale[:, None, None, None], grid.zero_point[:, None, None, None]
    codes = ((x / scale).round() + zero_point).clamp(0, 255)
    assert torch.equal(scale * (codes - zero_point), expected)
    assert varies(*grid) == (kind != "static")


def test_chosen_bits_are_in_the_table(tiny_unet: nn.Module) -> None:
    model = model_of(tiny_unet, activation=[4, 8])
    model.use_bits([8, 4, 4, 8])
    grid = activation_scale(model.layer("conv_in").input_quantizer, 4)
    assert isinstance(grid, ScaleTable)
    assert grid.highest.tolist() == [255, 15, 15, 255]


def test_bits_by_step_with_ranges_at_run_time_are_in_no_record(tiny_unet: nn.Module) -> None:
    scales = ScalePlan(DynamicConfig("sample"), DynamicConfig("sample"))
    rows = deployed_layers(model_of(tiny_unet, activation=[4, 8], scales=scales))
    assert {row.why for row in rows} == {"bits are chosen by sampling step, but scales are computed from the tensor"}
    assert {product.input for row in rows for product in row.products} == {None}


def test_generated_scales_are_the_table_that_they_are_merged_into(tiny_unet: nn.Module) -> None:
    scale = TDQConfig(Normalised(1000), (4,), 0.0, "default")
    model = model_of(tiny_unet, scales=ScalePlan(scale, scale))
    before = activation_scale(model.layer("conv_in").input_quantizer, 4)
    model.tabulate_scales()
    after = activation_scale(model.layer("conv_in").input_quantizer, 4)
    assert isinstance(before, ScaleTable)
    assert isinstance(after, ScaleTable)
    assert torch.equal(before.scale, after.scale)
    assert torch.equal(before.zero_point, after.zero_point)
    assert varies(*after)
