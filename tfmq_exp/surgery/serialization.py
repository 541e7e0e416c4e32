"""The quantized model as one file: integer codes packed to their bit-width, scales, tables, and what stayed float.

Everything that is needed to run is in the file, so it loads alone, strictly, without the float checkpoint and without a
forward pass; the loaded model is bit-equal to the one that was saved. Simulated execution: the codes are turned back
into real numbers on loading.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.tensor_file import read_tensor_file, write_tensor_file
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import finite_set
from tfmq_exp.surgery.empty_features import check_stored
from tfmq_exp.surgery.manifest import check_entries, described, difference, rebuilt
from tfmq_exp.surgery.quantized_network import QuantizedNetwork
from tfmq_exp.surgery.stored_tensors import WrittenTensors, from_stored, stored_parts, to_stored

FORMAT, VERSION = "tfmq_exp.quantized_unet", 5


@torch.no_grad()
def fill(model: QuantizedNetwork, tensors: Mapping[str, Tensor], outside: Sequence[str]) -> None:
    """Give a model its stored numbers, each of which is used exactly once; ValueError for one that is missing or left over.

    What is on the meta device in the model stays there.
    """
    left = set(tensors)
    for part in stored_parts(model):
        if part.key not in left:
            raise ValueError(f"it lacks {part.key!r}")
        left.remove(part.key)
        if not part.value.is_meta:
            part.value.copy_(from_stored(part, tensors[part.key], outside))
    if left:
        raise ValueError(f"it holds {len(left)} tensors that the model has no place for, first {min(left)!r}")
    for name, integers in model.integers.items():
        model.freeze(name, integers)
    check_stored(model)


def save(
    model: QuantizedNetwork,
    path: Path,
    recipe: Recipe | None = None,
    missing: Callable[[str], Tensor] | None = None,
) -> int:
    """Write the model, with how it is sampled if that is given; returns the number of bytes.

    Args:
        model: with integer weights; its largest tensors may be on the meta device.
        path: of the file.
        recipe: of sampling.
        missing: gives what is on the meta device, tensor by tensor, see `WrittenTensors`; None where nothing is.

    Raises:
        ValueError: some weight is not frozen to integers yet.
        RuntimeError: some activation quantizer has had no calibration data.
    """
    frozen = model.integers
    if absent := [name for name in model.weight_layers() if name not in frozen]:
        raise ValueError(f"{len(absent)} weights are not integers yet, first {absent[0]!r}")
    model.require_calibrated()
    manifest = described(model) | {"recipe": None if recipe is None else recipe.to_json()}
    if missing is None:
        tensors: Mapping[str, Tensor] = {part.key: to_stored(part) for part in stored_parts(model)}
    else:
        tensors = WrittenTensors(model, missing)
    sha256 = checksum(json.dumps(manifest, sort_keys=True), tensors)
    header = {"format": FORMAT, "version": VERSION, "manifest": manifest, "sha256": sha256}
    write_tensor_file(path, tensors, header)
    return path.stat().st_size


def checksum(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that is in the file: a damaged byte could otherwise pass for another scale or layer size."""
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The manifest and the tensors of an undamaged file of this version; ValueError otherwise."""
    header, tensors = read_tensor_file(path)
    return checked_manifest(path, header, tensors), tensors


def checked_manifest(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The manifest in the header of an undamaged file of this version; ValueError otherwise."""
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
    return manifest


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
        return filled(manifest, model, tensors), recipe


def filled(manifest: Mapping[str, Any], model: QuantizedNetwork, tensors: Mapping[str, Tensor]) -> QuantizedNetwork:
    """A model of `rebuilt` with its numbers, its activations quantized; ValueError where it would write another manifest."""
    fill(model, tensors, manifest.get("outside", ()))
    model.set_activations(Mode.QUANTIZE)
    if wrong := difference({key: value for key, value in manifest.items() if key != "recipe"}, described(model)):
        raise ValueError(f"its manifest is not that of the model: {wrong}")
    return model


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
