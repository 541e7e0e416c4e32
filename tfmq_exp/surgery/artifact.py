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

from tfmq_exp.denoisers.unet import attentions, set_heads
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.ranges import MinMax
from tfmq_exp.quant.sources.base import RunningRange
from tfmq_exp.quant.spec import QParams
from tfmq_exp.surgery.plan import resolved_from_json
from tfmq_exp.surgery.quantized_unet import QuantizedUNet, build

FORMAT, VERSION = "tfmq_exp.quantized_unet", 1
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
    for site, (codes, qparams, spec) in model.integers.items():
        tensors[f"weights/{site}/codes"] = pack(codes, spec.bits)
        tensors[f"weights/{site}/scale"] = qparams.scale.flatten()
        if spec.scheme == "affine":
            tensors[f"weights/{site}/zero_point"] = smallest(qparams.zero_point.flatten())
        shapes[site] = list(codes.shape)
    for name, quantizer in model.activation_quantizers().items():
        source = quantizer.source
        if not isinstance(source, RunningRange):
            raise TypeError(f"a {type(source).__name__} has no table of scales to store ({name})")
        tensors[f"inputs/{name}/scale"] = source.scale
        tensors[f"inputs/{name}/zero_point"] = smallest(source.zero_point)
    integer = {f"{site}.weight" for site in model.integers}
    sources = tuple(f"{name}." for name in model.activation_quantizers())
    for name, value in model.unet.state_dict().items():
        if name not in integer and not name.startswith(sources):
            tensors[f"float/{name}"] = value
    manifest = {
        "network": type(model.unet).__name__,
        "config": {k: v for k, v in dict(model.unet.config).items() if not k.startswith("_")},
        "plan": dataclasses.asdict(model.plan),
        "shapes": shapes,
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


def rebuilt(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedUNet:
    """The model that a manifest describes, with its tensors; ValueError or RuntimeError where they do not fit."""
    if manifest["network"] not in NETWORKS:
        raise ValueError(f"unknown network {manifest['network']!r}; known: {', '.join(NETWORKS)}")
    plan = resolved_from_json(manifest["plan"])
    with torch.device("meta"):
        unet = getattr(diffusers, manifest["network"]).from_config(manifest["config"])
    unet.to_empty(device="cpu")
    for name, attention in attentions(unet).items():
        set_heads(attention, manifest["heads"][name])
    model = build(unet, plan, MinMax())
    taken: set[str] = set()

    def take(key: str) -> Tensor:
        taken.add(key)
        if key not in tensors:
            raise ValueError(f"it lacks {key!r}")
        return tensors[key]

    state = {}
    for site in model.weight_sites():
        spec = plan.sites[site].weight
        assert spec is not None
        shape = tuple(manifest["shapes"][site])
        scale = take(f"weights/{site}/scale").reshape(spec.range_shape(shape))
        zero_point = torch.zeros_like(scale)
        if spec.scheme == "affine":
            zero_point = take(f"weights/{site}/zero_point").float().reshape(scale.shape)
        codes = unpack(take(f"weights/{site}/codes"), spec.bits, shape)
        model.freeze(site, QuantizedWeight(codes, QParams(scale, zero_point), spec))
        state[f"{site}.weight"] = model.layer(site).weight
    for name in model.activation_quantizers():
        for part in ("scale", "zero_point"):
            state[f"{name}.source.{part}"] = take(f"inputs/{name}/{part}").float()
    state |= {name: take(f"float/{name}") for name in model.unet.state_dict() if name not in state}
    if extra := set(tensors) - taken:
        raise ValueError(f"it holds {len(extra)} tensors that the model has no place for, first {min(extra)!r}")
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
