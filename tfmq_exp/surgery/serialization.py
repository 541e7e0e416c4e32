"""The quantized model as one file: integer codes packed to their bit-width, scales, tables, and what stayed float.

Everything that is needed to run is in the file, so it loads alone, strictly, without the float checkpoint and without a
forward pass; the loaded model is bit-equal to the one that was saved. Simulated execution: the codes are turned back
into real numbers on loading.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.core.tensor_file import read_tensor_file, write_tensor_file
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import finite_set
from tfmq_exp.surgery.empty_features import check_stored
from tfmq_exp.surgery.manifest import check_entries, described, difference, inside, rebuilt, stored_integers
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

FORMAT, VERSION = "tfmq_exp.quantized_unet", 5


class StoredPart(NamedTuple):
    """A tensor of the model that is in its file: its name there, how it is stored, its integers, and the tensor itself."""

    key: str
    kind: Literal["codes", "scale", "zero_point", "float"]
    spec: QuantSpec | None
    value: Tensor


def stored_parts(model: QuantizedNetwork) -> Iterator[StoredPart]:
    """All tensors of the file: integers, scales of activations, and what stayed float. The weights of integers are not in it."""
    for name, (codes, (scale, zero_point), spec) in stored_integers(model).items():
        yield StoredPart(f"{name}/codes", "codes", spec, codes)
        yield StoredPart(f"{name}/scale", "scale", spec, scale)
        if spec.scheme == "affine":  # a zero point that is always 0 is not stored
            yield StoredPart(f"{name}/zero_point", "zero_point", spec, zero_point)
    if model.context.conditions is not None:
        for name, value in model.context.conditions.rows.items():
            yield StoredPart(f"conditions/{name}", "float", None, value)
    quantizers, frozen = model.activation_quantizers(), model.integers
    for name, quantizer in quantizers.items():
        for key, value in quantizer.state_dict().items():
            part = key.removeprefix("scale_provider.")
            kind: Any = part if part in ("scale", "zero_point") else "float"
            yield StoredPart(f"activations/{name}/{part}", kind, quantizer.spec, value)
    elsewhere = (*(f"{name}." for name in quantizers), *(f"{name}.integers." for name in frozen))
    weights = {f"{name}.weight" for name in frozen}
    for name, value in model.network.state_dict().items():
        if name not in weights and not name.startswith(elsewhere):
            yield StoredPart(f"float/{name}", "float", None, value)


def to_stored(part: StoredPart) -> Tensor:
    """A part of the model as it is written."""
    value = part.value.detach().cpu()
    if part.kind == "codes" and part.spec:
        return pack(value, part.spec.bits)
    if part.kind == "zero_point":  # a byte where all lie in a byte's range
        return value.flatten().to(torch.uint8 if bool(((value >= 0) & (value <= 255)).all()) else torch.float32)
    # tied quantizers share their memory
    return value.flatten().clone() if part.kind == "scale" else value.clone().contiguous()


def from_stored(part: StoredPart, value: Tensor, outside: Sequence[str]) -> Tensor:
    """The inverse of `to_stored`; ValueError for a tensor that is none. Zero points `outside` the grid are named there."""
    key, spec = part.key, part.spec
    dtypes = {"codes": (torch.uint8,), "zero_point": (torch.uint8, torch.float32)}.get(part.kind, (part.value.dtype,))
    if value.dtype not in dtypes:
        raise ValueError(f"{key!r} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{key!r} has numbers that are not finite")
    if part.kind == "codes" and spec:
        return unpack(value, spec.bits, tuple(part.value.shape))
    if part.kind == "scale" and not bool((value > 0).all()):
        raise ValueError(f"{key!r} must be positive, got {float(value.min()):g}")
    if part.kind == "zero_point" and spec:
        value = value.float()
        if not bool((value == value.round()).all()):
            raise ValueError(f"{key!r} must be integers")
        allowed = key.startswith("weights/") and key.removesuffix("/zero_point") in outside
        if not allowed and not inside(value, spec):
            ends = f"{float(value.min()):g} .. {float(value.max()):g}"
            raise ValueError(f"{key!r} must lie within the grid {spec.qmin} .. {spec.qmax}, got {ends}")
    shape = part.value.shape if part.kind == "float" else part.value.flatten().shape
    if value.shape != shape:
        raise ValueError(f"{key!r} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
    return value.reshape(part.value.shape)


@torch.no_grad()
def fill(model: QuantizedNetwork, tensors: Mapping[str, Tensor], outside: Sequence[str]) -> None:
    """Give a model its stored numbers, each of which is used exactly once; ValueError for one that is missing or left over."""
    left = dict(tensors)
    for part in stored_parts(model):
        if part.key not in left:
            raise ValueError(f"it lacks {part.key!r}")
        part.value.copy_(from_stored(part, left.pop(part.key), outside))
    if left:
        raise ValueError(f"it holds {len(left)} tensors that the model has no place for, first {min(left)!r}")
    for name, integers in model.integers.items():
        model.freeze(name, integers)
    check_stored(model)


def save(model: QuantizedNetwork, path: Path, recipe: Recipe | None = None) -> int:
    """Write the artefact, with how the model is sampled for `load_recipe`; returns its size in bytes.

    Raises:
        ValueError: some weight is not frozen to integers yet.
        RuntimeError: some activation quantizer has had no calibration data.
    """
    frozen = model.integers
    if missing := [name for name in model.weight_layers() if name not in frozen]:
        raise ValueError(f"{len(missing)} weights are not integers yet, first {missing[0]!r}")
    model.require_calibrated()
    manifest = described(model) | {"recipe": None if recipe is None else recipe.to_json()}
    tensors = {part.key: to_stored(part) for part in stored_parts(model)}
    sha256 = checksum(json.dumps(manifest, sort_keys=True), tensors)
    header = {"format": FORMAT, "version": VERSION, "manifest": manifest, "sha256": sha256}
    write_tensor_file(path, tensors, header)
    return path.stat().st_size


def checksum(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that is in the file: a damaged byte could otherwise pass for another scale or layer size."""
    digest = hashlib.sha256(manifest.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    with naming(path):
        check_entries(manifest)
    return manifest, tensors


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make any error, as a foreign file may cause everywhere, a ValueError of one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be loaded: {' '.join(reason.split())[:600]}") from error


def load_with_recipe(path: Path) -> tuple[QuantizedNetwork, Recipe | None]:
    """Build the model from the file alone, ready to be called at `model.context.timesteps`, and how it is sampled.

    Raises:
        ValueError: not such a file, damaged, of another version, or with tensors or entries that no model has.
    """
    manifest, tensors = read(path)
    with naming(path):
        recipe = None if manifest["recipe"] is None else Recipe.from_json(manifest["recipe"])
        model = rebuilt(manifest, tensors)
        if recipe:
            check_recipe(recipe, model)
        fill(model, tensors, manifest.get("outside", ()))
        model.set_activations(Mode.QUANTIZE)
        if wrong := difference({key: value for key, value in manifest.items() if key != "recipe"}, described(model)):
            raise ValueError(f"its manifest is not that of the model: {wrong}")
        return model, recipe


def check_recipe(recipe: Recipe, model: QuantizedNetwork) -> None:
    """ValueError for a recipe of other timesteps than the tables have, in another order, or of samples that are not the network's."""
    steps, sampled = model.plan.timesteps, finite_set(recipe.sampling.sampler, recipe.schedule)
    same = set(steps) == set(sampled)
    if sampled != steps and (same or model.plan.outside_timesteps == "error"):
        wrong = next(((a, b) for a, b in zip(steps, sampled, strict=False) if a != b), (len(steps), len(sampled)))
        raise ValueError(
            f"'plan.timesteps' must be those of its sampler, in its order: {wrong[1]} stands where it has {wrong[0]}"
        )
    config = model.network.config
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is not None and channels not in recipe.shape:
        raise ValueError(f"'recipe.shape' must have the network's {channels} channels, got {list(recipe.shape)}")
    down = 2 ** (len(config["block_out_channels"]) - 1) if "block_out_channels" in config else config.get("patch_size")
    sides = recipe.shape[1:] if isinstance(size, int) and recipe.shape[0] == channels and isinstance(down, int) else ()
    if wrong := [side for side in sides if side % down]:
        raise ValueError(f"'recipe.shape' must have sides that {down} divides, got {wrong[0]}")


def load(path: Path) -> QuantizedNetwork:
    """The model of a file alone; errors are those of `load_with_recipe`."""
    return load_with_recipe(path)[0]


def load_recipe(path: Path) -> Recipe:
    """Sampling recipe of a stored model: `load_recipe(path).images(load(path), seed=0, indices=range(16))`.

    Raises:
        ValueError: not such a file, damaged, of another version, or written without a recipe.
    """
    manifest, _ = read(path)
    if manifest["recipe"] is None:
        raise ValueError(f"{path} does not say how to sample: its sampler was a class of one's own")
    with naming(path):
        return Recipe.from_json(manifest["recipe"])


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes one after the other with `bits` bits each, most significant bit first, zero bits at the end."""
    unpacked = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(unpacked))


def unpack(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
    """The inverse of `pack`; ValueError where the number of bytes does not fit the shape."""
    count = int(np.prod(shape))
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    rows = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    codes = np.packbits(rows, axis=1)[:, 0] >> (8 - bits)
    return torch.from_numpy(codes.reshape(shape).copy())
