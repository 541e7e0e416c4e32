"""The quantized model as one file: integer codes packed to their bit-width, scales, tables, and what stayed float.

Everything that is needed to run is in the file, so it loads alone, strictly, without the float checkpoint and without a
forward pass; the loaded model is bit-equal to the one that was saved. Simulated execution: the codes are turned back
into real numbers on loading.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.tensor_file import read_tensor_file, write_tensor_file
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.surgery.manifest import check_entries, described, stored_integers
from tfmq_exp.surgery.packing import pack
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.rebuilding import rebuilt

FORMAT, VERSION = "tfmq_exp.quantized_unet", 5


def smallest(zero_point: Tensor) -> Tensor:
    """A zero point in the smallest type that holds it: a byte when it lies in a byte's range, else float32."""
    fits = bool(((zero_point >= 0) & (zero_point <= 255)).all())
    return zero_point.to(torch.uint8) if fits else zero_point.float()


def checksum(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that is in the file: a damaged byte could otherwise pass for another scale or layer size."""
    digest = hashlib.sha256(manifest.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_tensors(model: QuantizedUNet) -> dict[str, Tensor]:
    """All tensors of the file by name: packed integers, scales of activations, and what stayed float."""
    tensors: dict[str, Tensor] = {}
    for name, (codes, qparams, spec) in stored_integers(model).items():
        tensors |= {f"{name}/codes": pack(codes, spec.bits), f"{name}/scale": qparams.scale.flatten()}
        if spec.scheme == "affine":  # a zero point that is always 0 is not stored
            tensors[f"{name}/zero_point"] = smallest(qparams.zero_point.flatten())
    quantizers = model.activation_quantizers()
    for name, quantizer in quantizers.items():
        for key, value in quantizer.state_dict().items():
            part = key.removeprefix("source.")
            # tied quantizers share their memory
            tensors[f"activations/{name}/{part}"] = smallest(value) if part == "zero_point" else value.clone()
    elsewhere = tuple(f"{name}." for name in quantizers) + tuple(f"{name}.integers." for name in model.integers)
    frozen = {f"{name}.weight" for name in model.integers}
    for name, value in model.unet.state_dict().items():
        if name not in frozen and not name.startswith(elsewhere):
            tensors[f"float/{name}"] = value
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def save(model: QuantizedUNet, path: Path, recipe: Recipe | None = None) -> int:
    """Write the artefact; returns its size in bytes.

    Args:
        model: all its weights are integers.
        path: the file.
        recipe: how the model is sampled, for `load_recipe`.

    Raises:
        ValueError: some weight is not frozen to integers yet.
        RuntimeError: some activation quantizer has had no calibration data.
    """
    frozen = model.integers
    if missing := [name for name in model.weight_layers() if name not in frozen]:
        raise ValueError(f"{len(missing)} weights are not integers yet, first {missing[0]!r}")
    model.require_calibrated()
    manifest = described(model) | {"recipe": None if recipe is None else recipe.to_json()}
    tensors, text = stored_tensors(model), json.dumps(manifest, sort_keys=True)
    header = {"format": FORMAT, "version": VERSION, "manifest": manifest, "sha256": checksum(text, tensors)}
    write_tensor_file(path, tensors, header)
    return path.stat().st_size


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The manifest and the tensors of an undamaged file of this version; ValueError otherwise."""
    header, tensors = read_tensor_file(path)
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        found = f"{header.get('format')} version {header.get('version')}"
        raise ValueError(f"{path} holds {found}; this program reads {FORMAT} version {VERSION}")
    if unknown := header.keys() - {"format", "version", "manifest", "sha256"}:
        raise ValueError(f"{path} has an unknown entry {min(unknown)!r} in its header")
    manifest = header.get("manifest", {})
    if header.get("sha256") != checksum(json.dumps(manifest, sort_keys=True), tensors):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return manifest, tensors


def load_with_recipe(path: Path) -> tuple[QuantizedUNet, Recipe | None]:
    """Build the model from the file alone, ready to be called at `model.context.timesteps`, and how it is sampled.

    Raises:
        ValueError: not such a file, damaged, of another version, with tensors missing or left over, or with numbers or
            entries that no model has.
    """
    manifest, tensors = read(path)
    try:
        check_entries(manifest)
        recipe = read_recipe(manifest)
        return rebuilt(manifest, tensors), recipe
    except Exception as error:  # a foreign file can fail anywhere
        raise ValueError(f"{path} cannot be loaded: {reason_of(error)}") from error


def load(path: Path) -> QuantizedUNet:
    """The model of a file alone; errors are those of `load_with_recipe`."""
    return load_with_recipe(path)[0]


def load_recipe(path: Path) -> Recipe:
    """Sampling recipe of a stored model: `load_recipe(path).images(load(path), seed=0, indices=range(16))`.

    Raises:
        ValueError: not such a file, damaged, of another version, or written without a recipe.
    """
    manifest, _ = read(path)
    try:
        check_entries(manifest)
        recipe = read_recipe(manifest)
    except Exception as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error
    if recipe is None:
        raise ValueError(f"{path} does not say how to sample: its sampler was a class of one's own")
    return recipe


def read_recipe(manifest: Mapping[str, Any]) -> Recipe | None:
    """Recipe of a manifest, None if it has none; any error for what is no recipe."""
    return None if manifest["recipe"] is None else Recipe.from_json(manifest["recipe"])


def reason_of(error: Exception) -> str:
    """An error in one line."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:600]
