"""The quantized model as one file: integer codes packed to their bit-width, scales, tables, and what stayed float.

Everything that is needed to run is in the file, so it loads alone, strictly, without the float checkpoint and without a
forward pass; the loaded model is bit-equal to the one that was saved. Simulated execution: the codes are turned back
into real numbers on loading.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tfmq_exp.denoisers.settings import check_sizes
from tfmq_exp.denoisers.unet import attentions, set_heads
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.ranges import MinMax
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.surgery.plan import resolved_from_json, resolved_to_json
from tfmq_exp.surgery.quantized_unet import QuantizedUNet, build
from tfmq_exp.surgery.temporal_cache import Unneeded

FORMAT, VERSION = "tfmq_exp.quantized_unet", 2
NETWORKS = ("UNet2DModel", "UNet2DConditionModel")


def pack(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes one after the other with `bits` bits each, most significant bit first, zero bits at the end."""
    unpacked = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(unpacked))


def unpack(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "*shape"]:
    """The inverse of `pack`.

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    count = int(np.prod(shape))
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    rows = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    codes = np.packbits(rows, axis=1)[:, 0] >> (8 - bits)
    return torch.from_numpy(codes.reshape(shape).copy())


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


def packed(integers: QuantizedWeight) -> dict[str, Tensor]:
    """Integers as they are stored; a zero point that is always 0 is not."""
    codes, qparams, spec = integers
    parts = {"codes": pack(codes, spec.bits), "scale": qparams.scale.flatten()}
    return parts | ({"zero_point": smallest(qparams.zero_point.flatten())} if spec.scheme == "affine" else {})


def stored_integers(model: QuantizedUNet) -> dict[str, QuantizedWeight]:
    """All integer tensors by the name that they have in the file: weights part by part, and cached temporal features."""
    weights = {f"weights/{site}/{i}": part for site, parts in model.integers.items() for i, part in enumerate(parts)}
    return weights | {f"cached/{site}": integers for site, integers in model.cached.items()}


def save(model: QuantizedUNet, path: Path) -> int:
    """Write the artefact; returns its size in bytes.

    Raises:
        ValueError: some weight is not frozen to integers yet.
        RuntimeError: some activation quantizer has seen no calibration data.
    """
    if missing := [site for site in model.weight_sites() if site not in model.integers]:
        raise ValueError(f"{len(missing)} weights are not integers yet, first {missing[0]!r}")
    model.require_calibrated()
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, integers in stored_integers(model).items():
        tensors |= {f"{name}/{part}": value for part, value in packed(integers).items()}
        shapes[name] = list(integers.codes.shape)
    for name, quantizer in model.activation_quantizers().items():
        for key, value in quantizer.state_dict().items():
            part = key.removeprefix("source.")
            # tied ones share their memory
            tensors[f"activations/{name}/{part}"] = smallest(value) if part == "zero_point" else value.clone()
    integer = {f"{site}.weight" for site in model.integers}
    sources = tuple(f"{name}." for name in model.activation_quantizers())
    for name, value in model.unet.state_dict().items():
        if name not in integer and not name.startswith(sources):
            tensors[f"float/{name}"] = value
    manifest = {
        "network": type(model.unet).__name__,
        "config": {k: v for k, v in dict(model.unet.config).items() if not k.startswith("_")},
        "plan": resolved_to_json(model.plan),
        "shapes": shapes,
        "cached": {site: dataclasses.asdict(integers.spec) for site, integers in model.cached.items()},
        "unneeded": [name for name, module in model.unet.named_modules() if isinstance(module, Unneeded)],
        # not always what the configuration says: the original networks have one number of heads at every width
        "heads": {name: module.heads for name, module in attentions(model.unet).items()},
    }
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(manifest, sort_keys=True)
    header = {"format": FORMAT, "version": VERSION, "manifest": manifest, "sha256": checksum(text, stored)}
    # one entry: safetensors writes several in random order, and equal models shall be equal files
    save_file(stored, path, {"header": json.dumps(header, sort_keys=True)})
    return path.stat().st_size


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of an undamaged file of this version; ValueError otherwise."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable artefact (damaged or truncated?): {error}") from error
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        found = f"{header.get('format')} version {header.get('version')}"
        raise ValueError(f"{path} holds {found}; this program reads {FORMAT} version {VERSION}")
    manifest = header.get("manifest", {})
    if header.get("sha256") != checksum(json.dumps(manifest, sort_keys=True), tensors):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return manifest, tensors


class Stored:
    """The tensors of a file, each of which is taken exactly once; ValueError for one that is missing or left over."""

    def __init__(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.manifest, self.tensors = manifest, dict(tensors)

    def take(self, key: str) -> Tensor:
        """One tensor."""
        if key not in self.tensors:
            raise ValueError(f"it lacks {key!r}")
        return self.tensors.pop(key)

    def integers(self, name: str, spec: QuantSpec) -> QuantizedWeight:
        """What `packed` stored."""
        shape = tuple(self.manifest["shapes"][name])
        scale = self.take(f"{name}/scale").reshape(spec.range_shape(shape))
        zero_point = torch.zeros_like(scale)
        if spec.scheme == "affine":
            zero_point = self.take(f"{name}/zero_point").float().reshape(scale.shape)
        return QuantizedWeight(unpack(self.take(f"{name}/codes"), spec.bits, shape), QParams(scale, zero_point), spec)

    def end(self) -> None:
        """Everything must have been taken."""
        if self.tensors:
            count, first = len(self.tensors), min(self.tensors)
            raise ValueError(f"it holds {count} tensors that the model has no place for, first {first!r}")


def empty_network(manifest: Mapping[str, Any]) -> torch.nn.Module:
    """The float network that a manifest describes, with nothing in its parameters yet."""
    if manifest["network"] not in NETWORKS:
        raise ValueError(f"unknown network {manifest['network']!r}; known: {', '.join(NETWORKS)}")
    check_sizes("its configuration", manifest["config"], 0)
    with torch.device("meta"):
        unet = getattr(diffusers, manifest["network"]).from_config(manifest["config"])
    unet.to_empty(device="cpu")
    for name, attention in attentions(unet).items():
        set_heads(attention, manifest["heads"][name])
    return unet


def rebuilt(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedUNet:
    """The model that a manifest describes, with its tensors; ValueError or RuntimeError where they do not fit."""
    stored = Stored(manifest, tensors)
    plan = resolved_from_json(manifest["plan"])
    model = build(empty_network(manifest), plan, MinMax())
    state = {}
    for site in model.weight_sites():
        line = plan.sites[site]
        assert line.weight is not None
        parts = range(2 if line.split else 1)
        model.freeze(site, tuple(stored.integers(f"weights/{site}/{i}", line.weight) for i in parts))
        state[f"{site}.weight"] = model.layer(site).weight
    for site, spec in manifest["cached"].items():
        model.cache_feature(site, stored.integers(f"cached/{site}", QuantSpec(**spec)))
    for site in manifest["unneeded"]:
        model.drop(site)
    for name, quantizer in model.activation_quantizers().items():
        for key in quantizer.state_dict():
            state[f"{name}.{key}"] = stored.take(f"activations/{name}/{key.removeprefix('source.')}").float()
    state |= {name: stored.take(f"float/{name}") for name in model.unet.state_dict() if name not in state}
    stored.end()
    model.unet.load_state_dict(state, strict=True)
    model.set_activations(Mode.QUANTIZE)
    return model


def load(path: Path) -> QuantizedUNet:
    """Build the model from the file alone, ready to sample.

    Raises:
        ValueError: not such a file, damaged, of another version, or with tensors missing or left over.
    """
    manifest, tensors = read(path)
    try:
        return rebuilt(manifest, tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
