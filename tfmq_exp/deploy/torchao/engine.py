"""torchao engine: linear layers and 1x1 convolutions as small matrix products on a GPU; other layers stay simulated there."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.deploy.engine import require_package, write_manifest
from tfmq_exp.deploy.layers import ProductUNet, deployed_layers, layer_report
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


@dataclass(frozen=True)
class TorchAO:
    """`engine=torchao`; the optional package is imported after a check that it is installed.

    Args:
        dtype: of the products: int8, fp8 or int4; see `products`.
        device: a CUDA device; the CPU computes the same, slowly.

    Raises:
        ValueError: no GPU, no package torchao, another dtype, or a GPU without its kernel.
    """

    dtype: str
    device: str = "cuda"

    name = "torchao"

    def __post_init__(self) -> None:
        on_gpu = torch.device(self.device).type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise ValueError(
                f"engine=torchao needs a CUDA device, and torch {torch.__version__} finds none; "
                "on a CPU integers are executed by engine=openvino or engine=onednn"
            )
        require_package("torchao")
        if self.dtype not in self.formats:
            raise ValueError(f"engine.dtype must be {', '.join(self.formats)}, got {self.dtype!r}")
        needed = self.formats[self.dtype].capability
        if on_gpu and (found := torch.cuda.get_device_capability(self.device)) < needed:
            raise ValueError(
                f"engine.dtype={self.dtype} needs a GPU of compute capability {needed[0]}.{needed[1]} or more; "
                f"{torch.cuda.get_device_name(self.device)} has {found[0]}.{found[1]}"
            )

    @property
    def formats(self) -> Mapping[str, Any]:
        from tfmq_exp.deploy.torchao.products import FORMATS

        return FORMATS

    @property
    def identity(self) -> Mapping[str, Any]:
        versions = {"version": version("torchao"), "torch": torch.__version__.partition("+")[0]}
        return {"name": self.name, "dtype": self.dtype, "device": torch.device(self.device).type, **versions}

    def export(self, model: QuantizedNetwork, example: Mapping[str, Tensor], folder: Path) -> None:
        """Write the layer report alone: the artefact is what the engine executes."""
        product_format, layers, executed = self.formats[self.dtype], deployed_layers(model), dict[str, dict[str, str]]()
        for layer in layers:
            why = product_format.why_not(layer)
            note = "" if why else product_format.note(layer.integer_weights)
            executed[layer.name] = {"executed": "float" if why else self.dtype, "note": note, "why": why}
        rows = [{**row, **executed.get(str(row["layer"]), {})} for row in layer_report(model, layers)]
        write_manifest(folder, {"layers": rows})

    def open(self, model: QuantizedNetwork, folder: Path, *, batch: int) -> nn.Module:
        """Replace layers of a copy on the device, where the kernel is checked first."""
        product_format, device = self.formats[self.dtype], torch.device(self.device)
        product_format.check(device)
        return ProductUNet(model, lambda layer: product_format.products(layer, device), device)
