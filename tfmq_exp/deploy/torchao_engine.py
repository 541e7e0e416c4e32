"""Small formats on a GPU: linear layers and 1x1 convolutions are torchao's matrix products, the rest is the simulation's.

In int8 a layer's codes are the simulation's, and differences are those of scaling exact sums; fp8 and int4 are other
arithmetic on the same weights (`torchao_products`). Convolutions stay simulated, on the same device.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchao.kernel.intmm import safe_int_mm

from tfmq_exp.deploy.engine import Prediction, write_manifest
from tfmq_exp.deploy.sites import Site, examine, table
from tfmq_exp.deploy.torchao_products import INT8_ROWS, INT8_STEP, Fp8Product, Int4Product, Int8Product, Product
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

PRODUCTS: Mapping[str, type[Product]] = {"int8": Int8Product, "fp8": Fp8Product, "int4": Int4Product}


class MatrixLayer(nn.Module):
    """A linear layer or 1x1 convolution as small products, with its bias and its output quantizer."""

    def __init__(self, site: Site, context: TimestepContext, product: type[Product], device: torch.device) -> None:
        super().__init__()
        self.axis = 1 if isinstance(site.layer, nn.Conv2d) else -1
        self.products = [product(piece, self.axis, device) for piece in site.pieces]
        self.sizes, self.context = [piece.channels for piece in site.pieces], context
        self.bias: Any = site.layer.bias
        self.input_quantizer = site.layer.input_quantizer  # products read its source, and this takes it to the device
        self.output_quantizer = site.layer.output_quantizer

    def forward(self, input: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """As the simulated layer."""
        pieces = input.split(self.sizes, dim=self.axis)
        y: Any = sum(product(x, self.context.index) for product, x in zip(self.products, pieces, strict=True))
        if self.bias is not None:
            y = y + self.bias
        places = input.movedim(self.axis, -1).shape[:-1]
        return self.output_quantizer(y.reshape(*places, -1).movedim(-1, self.axis).contiguous())


class TorchAODenoiser(nn.Module):
    """The quantized model on a device, with small products in place of the simulated layers that have them."""

    def __init__(
        self, model: QuantizedUNet, sites: Sequence[Site], product: type[Product], device: torch.device
    ) -> None:
        super().__init__()
        self.model, self.device = model, device
        for site in sites:
            if not obstacle(site, product):
                model.unet.set_submodule(site.name, MatrixLayer(site, model.context, product, device))
        model.to(device)

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Prediction:
        """As the simulated model; wherever the tensors are, it computes on its own device."""
        given = {name: value.to(self.device) for name, value in conditions.items()}
        t = torch.as_tensor(timestep).to(self.device)
        return Prediction(self.model(sample.to(self.device), t, **given).sample.to(sample))


def obstacle(site: Site, product: type[Product]) -> str:
    """Why a layer stays as the simulation has it; empty where it goes through the product."""
    layer = site.layer
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
        if geometry != ((1, 1), (1, 1), (0, 0), 1):
            return product.no_convolution
    return product.obstacle(site)


def rows_of(model: QuantizedUNet, form: str) -> list[Mapping[str, Any]]:
    """The table of sites as a form executes them."""
    product, sites = PRODUCTS[form], examine(model)
    own: dict[str, Mapping[str, str]] = {}
    for site in sites:
        why = obstacle(site, product)
        own[site.name] = {
            "executed": "float" if why else form,
            "form": "" if why else product.remark(site),
            "why": why,
        }
    return [{**row, **own.get(str(row["site"]), {})} for row in table(model, sites)]


def check_exact(device: torch.device) -> None:
    """Multiply what float32 cannot add up: torchao falls back to that, silently, where the integer kernel fails.

    Raises:
        ValueError: another sum than that of the integers.
    """
    rows = torch.full((INT8_ROWS, 2048), 127, dtype=torch.int8, device=device)
    rows[:, 0] = 0  # an odd number of odd products: their sum is odd, and above 2^24
    found = safe_int_mm(rows, torch.full((2048, INT8_STEP), 127, dtype=torch.int8, device=device))
    wanted = 2047 * 127 * 127
    if not bool((found == wanted).all()):
        raise ValueError(f"torchao's int8 product on {device} gives {int(found[0, 0])} for {wanted}")


@dataclass(frozen=True)
class TorchAO:
    """`engine=torchao`.

    Args:
        form: of the products: int8, fp8 or int4.
        device: a CUDA device; the CPU computes the same, slowly.

    Raises:
        ValueError: another form, or a GPU without its kernel.
    """

    form: str
    device: str = "cuda"

    name = "torchao"

    def __post_init__(self) -> None:
        if self.form not in PRODUCTS:
            raise ValueError(f"engine.form must be {', '.join(PRODUCTS)}, got {self.form!r}")
        if torch.device(self.device).type == "cuda":
            found, needed = torch.cuda.get_device_capability(self.device), PRODUCTS[self.form].capability
            if found < needed:
                raise ValueError(
                    f"engine.form={self.form} needs a GPU of compute capability {needed[0]}.{needed[1]} or more; "
                    f"{torch.cuda.get_device_name(self.device)} has {found[0]}.{found[1]}"
                )

    @property
    def identity(self) -> Mapping[str, Any]:
        """The form, the kind of device, and the versions of torchao and torch."""
        versions = {"version": version("torchao"), "torch": torch.__version__.partition("+")[0]}
        return {"name": self.name, "form": self.form, "device": torch.device(self.device).type, **versions}

    def export(self, model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path) -> None:
        """The table alone: the artefact is what it runs."""
        write_manifest(folder, {"sites": rows_of(model, self.form)})

    def open(self, model: QuantizedUNet, folder: Path, *, batch: int) -> nn.Module:
        """A copy of the model on the device; int8 is first asked whether it is exact there."""
        device = torch.device(self.device)
        if self.form == "int8":
            check_exact(device)
        own = copy.deepcopy(model)
        return TorchAODenoiser(own, examine(own), PRODUCTS[self.form], device)
