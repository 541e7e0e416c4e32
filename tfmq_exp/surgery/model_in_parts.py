"""A stored model of which only what is small is in memory: weights are made from their integers before a module runs."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from tfmq_exp.core.tensor_file import TensorFile
from tfmq_exp.denoisers.loading.loading_modules import Read
from tfmq_exp.denoisers.loading.sharded_weights import META
from tfmq_exp.quant.layers import QuantizedWeight, real_weight
from tfmq_exp.surgery.manifest import rebuilt
from tfmq_exp.surgery.quantized_network import QuantizedNetwork
from tfmq_exp.surgery.serialization import checked_manifest, filled, naming
from tfmq_exp.surgery.stored_tensors import from_stored, stored_parts


def load_in_parts(path: Path) -> tuple[QuantizedNetwork, Read]:
    """The model of a file with its weights and codes on the meta device, and what reads its parameters for `loading_modules`.

    Outputs are those of `serialization.load`, bit for bit, and so are errors. UNets are loaded whole.
    """
    file = TensorFile(path)
    manifest = checked_manifest(path, file.header, file)
    with naming(path):
        model = filled(manifest, rebuilt(manifest, file.outlines, META), file)
    parts = {part.key: part for part in stored_parts(model) if part.value.is_meta}
    outside = manifest.get("outside", ())
    return model, parameters_of(model, lambda key: from_stored(parts[key], file[key], outside))


def parameters_of(model: QuantizedNetwork, value: Callable[[str], Tensor]) -> Read:
    """A function that gives parameters of a model by their names, those of quantized layers from their codes.

    Args:
        model: whose integers have codes on the meta device.
        value: gives codes, and what stayed float, by their names in the model's file.
    """
    frozen = {f"{layer}.weight": (layer, parts) for layer, parts in model.integers.items()}

    def parameter(name: str) -> Tensor:
        if name not in frozen:
            return value(f"float/{name}")
        layer, parts = frozen[name]
        codes = [value(f"weights/{layer}/{i}/codes") for i in range(len(parts))]
        return real_weight([part._replace(codes=on_device(x, part)) for x, part in zip(codes, parts, strict=True)])

    def read(names: Collection[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: parameter(name) for name in names}

    return read


def on_device(codes: Tensor, part: QuantizedWeight) -> Tensor:
    """Codes on the device of their ranges."""
    return codes.to(part.qparams.scale.device)
