"""Engines multiply what activation tables say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS
from tests.unit.deploy.test_activation_tables import KINDS, Kind, noise, quantizer_of
from tfmq_exp.deploy.activation_tables import (
    activation_scale,
    check_bytes,
)
from tfmq_exp.deploy.layers import DeployedLayer, DeployedProduct, ProductLayer
from tfmq_exp.deploy.onednn import available, onednn_products, pairs_saturate
from tfmq_exp.deploy.weight_tables import signed_weight
from tfmq_exp.quant.layers import QUANT_LAYERS, QuantLayer
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import WeightQuantizer
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(32, 32, 3, padding=1),
    "strided": lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1),
    "linear": lambda: nn.Linear(32, 32),
}


def deployed(kind: Kind, layer: nn.Module, context: TimestepContext) -> DeployedLayer:
    """A layer with four-bit weights behind such a quantizer."""
    quantized: QuantLayer = QUANT_LAYERS[type(layer)].from_float(layer)
    weights = WeightQuantizer(quantized.weight, QuantSpec(4, axis=0), MinMax())
    weights.observe(quantized.weight)
    quantized.weight_quantizer, quantized.input_quantizer = weights, quantizer_of(kind, context)
    (integers,) = quantized.quantized_weight()
    quantized.freeze_weight((integers,))
    grid = activation_scale(quantized.input_quantizer, context.num_steps)
    check_bytes(grid.table)
    return DeployedLayer(
        "layer", quantized.requires_grad_(False), (DeployedProduct(32, signed_weight(integers), grid),), None, ""
    )


def example(name: str, layer: str) -> tuple[DeployedLayer, TimestepContext, Tensor]:
    """The layer, its context, and an input with a row for every step."""
    context = TimestepContext(TIMESTEPS)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = LAYERS[layer]()
    x = noise(len(TIMESTEPS), 32, 6, 6, seed=3) - 0.1
    return deployed(KINDS[name], made, context), context, x.flatten(2).mT.contiguous() if layer == "linear" else x


CASES = [(name, "padded") for name in KINDS] + [
    (name, layer)
    for name in ("duq, per step, about a learned centre", "lsq of statistics and time, behind silu")
    for layer in ("strided", "linear")
]


@pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN operators for integers")
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_onednn_multiplies_them(name: str, layer: str) -> None:
    one, context, x = example(name, layer)
    with context.at(torch.tensor(TIMESTEPS)), torch.no_grad():
        products = onednn_products(one, pairs_saturate())
        expected, found = one.layer(x), ProductLayer(one, products, context)(x)
    assert (found - expected).abs().max() < 3e-6 * expected.abs().max()


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_openvino_multiplies_them(name: str, layer: str) -> None:
    """In integers, and as the simulation at every step but where an input lies at a tie."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.openvino.parity import compare_layer

    one, context, x = example(name, layer)
    run, integer = compiled(one, context, x)
    assert integer
    for step, t in enumerate(TIMESTEPS):
        with context.at(torch.full((len(x),), t)), torch.no_grad():
            row = compare_layer(
                one, context.index, x, torch.from_numpy(run({"sample": x.numpy(), "step": np.array(step)})[0])
            )
        assert (row.unexplained, row.step) == (0, step)
        assert row.beyond < 0.1 * row.outputs
        assert row.error < 0.05


@pytest.mark.parametrize("name", KINDS)
def test_openvino_puts_real_numbers_on_them(name: str) -> None:
    """Operands of attention, outputs, and inputs of layers whose weight is float."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    from tfmq_exp.deploy.openvino.graph import RealQuantizer
    from tfmq_exp.deploy.openvino.parity import at_tie

    context, x = TimestepContext(TIMESTEPS), noise(len(TIMESTEPS), 32, 6, 6)
    quantizer = quantizer_of(KINDS[name], context)
    grid = activation_scale(quantizer, len(TIMESTEPS))
    real = RealQuantizer(grid)
    run, _ = executed(real, context, x, real.quantizer.fake_quantize)
    for step, t in enumerate(TIMESTEPS):
        with context.at(torch.full((len(x),), t)), torch.no_grad():
            found, expected = torch.from_numpy(run({"sample": x.numpy(), "step": np.array(step)})[0]), quantizer(x)
            wrong = (found - expected).abs() > 1e-5 * expected.abs().max()
            assert not (wrong & ~at_tie(grid, x, context.index)).any()


def compiled(one: DeployedLayer, context: TimestepContext, x: Tensor) -> tuple[Any, bool]:
    """One layer as OpenVINO executes it, called with x and the step; and whether its product is in integers."""
    from tfmq_exp.deploy.openvino.export import executed_kernels, graph_products

    (product,) = graph_products(one, saturates=False)
    run, (node,) = executed(ProductLayer(one, [product], context), context, x, product.multiply)
    nodes = [n for n in executed_kernels(run) if n.product and any(name.startswith(node) for name in n.nodes)]
    return run, len(nodes) == 1 and nodes[0].integer


def executed(module: nn.Module, context: TimestepContext, x: Tensor, named: Any) -> tuple[Any, list[str]]:
    """A compiled model of x and the step, given what becomes of x; and names of the nodes of one of its operations."""
    import openvino as ov

    from tfmq_exp.deploy.engine import UNetOutput
    from tfmq_exp.deploy.openvino.runtime import compile_settings
    from tfmq_exp.deploy.openvino.trace import trace

    class Network(nn.Module):
        """With the signature of a UNet."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, sample: Tensor, timestep: Tensor) -> UNetOutput:
            return UNetOutput(self.module(sample))

    model, nodes = trace(Network(), context, {"sample": x, "timestep": torch.tensor(0)})
    for node in nodes[named]:
        node.set_friendly_name("product")
    return ov.Core().compile_model(model, "CPU", compile_settings(1, "f32")), ["product" for _ in nodes[named]]
