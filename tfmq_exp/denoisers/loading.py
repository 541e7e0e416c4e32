"""Pretrained denoisers from the disk: original checkpoints and diffusers folders. Nothing is ever downloaded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tfmq_exp.core.file_kind import instead_of_text, kind_of, why_missing
from tfmq_exp.core.files import sha256_of
from tfmq_exp.core.finite import require_finite, require_finite_weights
from tfmq_exp.denoisers import diffusers_folder, original
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.loading.class_embedder import ClassEmbedder
from tfmq_exp.denoisers.loading.compvis_checkpoint import Parts
from tfmq_exp.denoisers.loading.download_hints import where_to_find
from tfmq_exp.denoisers.loading.forward_check import inspect
from tfmq_exp.denoisers.loading.text_encoder import TextEncoder, tokenizer_files, tokenizer_settings
from tfmq_exp.denoisers.loading.weight_files import weight_files


def hash_json(value: Any) -> str:
    """SHA-256 of canonical JSON; values that JSON does not have count as their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_weights(path: Path) -> str:
    """SHA-256 of a checkpoint; of a folder that of the hashes of the weight files that are read from it."""
    if path.is_file():
        return sha256_of(path)
    folders = diffusers_folder.folders(path).values()
    files = [file for folder in folders for file in weight_files(folder)]
    return hash_json({file.relative_to(path).as_posix(): sha256_of(file) for file in files})


def read_architecture(config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any] | None:
    """An architecture that is given itself, or the path of the YAML file that it stands in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not a mapping.
    """
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"no architecture at {path}: expected a YAML file in the original program's layout")
    if kind := instead_of_text(path):
        raise ValueError(f"{path} {kind}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no architecture: expected names with values")
    return content


def check_weights(path: Path, parts: Parts) -> None:
    """Look at all weights that were read, of every network, in their own precision.

    Raises:
        NotFiniteError: one is NaN or infinite, which a damaged file and a training that diverged leave; names file and tensor.
    """
    inside = {
        "unet": parts.unet,
        "first_stage": getattr(parts.first_stage, "network", None),
        "text_encoder": getattr(parts.encoder, "model", None),
    }
    folders = diffusers_folder.folders(path) if path.is_dir() else {}
    for name, network in inside.items():
        if network is not None:
            require_finite_weights(network, f"{folders.get(name, path)}: the weights of {name}")
    if isinstance(parts.encoder, ClassEmbedder):
        require_finite(parts.encoder.embedding, f"{path}: the weights of the class embedding")


def load_denoiser(
    name: str,
    path: str | Path,
    config: Mapping[str, Any] | str | Path | None,
    ema: bool,
    tokenizer: str | Path | None = None,
    sha256: str | None = None,
    decode_rows: int = 8,
) -> Denoiser:
    """A pretrained denoiser: float32, in evaluation mode, without gradients, on the CPU.

    Args:
        name: of the model, as results have it.
        path: an original checkpoint (LDM, Stable Diffusion 1, DDIM), or a folder of diffusers' layout.
        config: the architecture in the original program's layout, or the path of a YAML file with it. With a folder it
            may be None; given, it says the numbers of heads that diffusers' configurations cannot express (LSUN-Churches).
        ema: the UNet's weights averaged over training, which an original checkpoint may hold beside the last ones.
        tokenizer: folder with CLIP's vocab.json and merges.txt, for models of text; a folder's own by default.
        sha256: what the weights must have: of the file, or of a folder as `hash_weights` counts it.
        decode_rows: how many images the first stage decodes together; bounds its memory.

    Raises:
        FileNotFoundError: the checkpoint or something else that the model needs is not there; the message says where it
            is published.
        ValueError: damaged, of another model, with other weights than expected, or not supported.
    """
    path, words = Path(path), None if tokenizer is None else Path(tokenizer)
    if not path.exists():
        raise FileNotFoundError(f"no weights of {name} at {path}{why_missing(path)}: {where_to_find(name)}")
    if not path.is_dir() and (kind := kind_of(path)):
        raise ValueError(f"{path}: {kind}")
    architecture = read_architecture(config)
    if path.is_file() and architecture is None:
        raise ValueError(f"{path} is one file: `config` must give its architecture")
    if path.is_dir() and ema:
        raise ValueError(f"{path} is a folder, which holds one set of weights: set ema=false")
    if path.is_dir():
        diffusers_folder.check(path)
    found = hash_weights(path)
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: damaged, or another file")
    try:
        if architecture is not None and path.is_file():
            parts = original.load(path, architecture, ema=ema, tokenizer=words, decode_rows=decode_rows)
        else:
            parts = diffusers_folder.load(path, architecture, tokenizer=words, decode_rows=decode_rows)
        check_weights(path, parts)  # before the network runs: a weight that is not finite is named, not what came of it
        inspect(parts)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    described = [architecture, diffusers_folder.architecture(path)] if path.is_dir() else architecture
    settings = {"ema": ema, "architecture_sha256": hash_json(described)}
    if isinstance(parts.encoder, TextEncoder):
        folder = words or path / "tokenizer"
        files = [*tokenizer_files(folder), *tokenizer_settings(folder)]
        settings["tokenizer_sha256"] = hash_json({file.name: sha256_of(file) for file in files})
    return Denoiser(name=name, weights_sha256=found, settings=settings, **parts._asdict())
