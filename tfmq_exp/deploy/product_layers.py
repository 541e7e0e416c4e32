"""A quantized UNet whose layers are executed, one by one, by an engine's integer products."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.deploy.engine import UNetOutput
from tfmq_exp.deploy.layer_report import DeployedLayer, deployed_layers
from tfmq_exp.deploy.weight_tables import per_row
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

# (real inputs of one group of channels, sampling step of every row) -> their product with the weight in float32, without bias
Product = Callable[[Float[Tensor, "batch ..."], Int[Tensor, "batch"]], Float[Tensor, "batch ..."]]


class ProductLayer(nn.Module):
    """A layer as its products, plus bias and output quantizer.

    Args:
        deployed: the layer.
        products: one for each of `deployed.products`.
        context: of the model.
    """

    def __init__(self, deployed: DeployedLayer, products: Sequence[Product], context: TimestepContext) -> None:
        super().__init__()
        self.axis, self.sizes = deployed.axis, [product.channels for product in deployed.products]
        self.products, self.context = list(products), context
        self.bias: Any = deployed.layer.bias
        self.input_quantizer = deployed.layer.input_quantizer  # products with a `RuntimeScale` use its source
        self.output_quantizer = deployed.layer.output_quantizer

    def forward(self, input: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Same signature as the simulated layer."""
        parts = input.split(self.sizes, dim=self.axis)
        y: Any = sum(product(part, self.context.index) for product, part in zip(self.products, parts, strict=True))
        if self.bias is not None:
            y = y + (per_row(self.bias, 3) if self.axis == 1 else self.bias)
        return self.output_quantizer(y)


class ProductUNet(nn.Module):
    """Copy of a quantized model on a device, with product layers.

    Args:
        model: the simulated model, which is not changed.
        make_products: products of a layer; None leaves the layer simulated.
        device: of the copy; inputs may be elsewhere.
    """

    def __init__(
        self,
        model: QuantizedUNet,
        make_products: Callable[[DeployedLayer], Sequence[Product] | None],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.device = copy.deepcopy(model).to(device), device
        for layer in deployed_layers(self.model):
            if products := make_products(layer):
                self.model.unet.set_submodule(layer.name, ProductLayer(layer, products, self.model.context))

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> UNetOutput:
        """Same signature as the simulated model; the result is on the device of `sample`."""
        given = {name: value.to(self.device) for name, value in conditions.items()}
        t = torch.as_tensor(timestep).to(self.device)
        return UNetOutput(self.model(sample.to(self.device), t, **given).sample.to(sample))
