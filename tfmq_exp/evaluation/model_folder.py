"""Folders of pretrained models that score images: what has to be there, and what identifies the scores that come of it."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from tfmq_exp.core.file_kind import kind_of, why_missing
from tfmq_exp.core.files import read_json, sha256_of
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.loading.network_config import check_code


def require_file(path: Path, published: str) -> Path:
    """A file that has to be there; FileNotFoundError with where it is published, ValueError for another kind of file."""
    if not path.exists():
        raise FileNotFoundError(
            f"no {path.name} at {path}{why_missing(path)}: nothing is downloaded; put {published} there"
        )
    if kind := kind_of(path):
        raise ValueError(f"{path} {kind}")
    return path


def check_settings(root: Path, published: str) -> None:
    """FileNotFoundError without a `config.json`; ValueError for one that names code."""
    path = root / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}: nothing is downloaded; put {published} there")
    check_code(path, read_json(path))


def load_model(kind: Any, root: Path, device: torch.device, published: str) -> Any:
    """A model of transformers' class `kind` from `model.safetensors`, float32, without gradients.

    Raises:
        FileNotFoundError: not there; says what is `published` for it.
        ValueError: damaged, of another architecture, or a folder that names code.
    """
    weights = require_file(root / "model.safetensors", published)
    check_settings(root, published)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    model, info = kind.from_pretrained(str(root), output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"{weights} lacks {len(missing)} weights of a {kind.__name__}, first {missing[0]}")
    return ready(model, weights, device)


def ready(model: nn.Module, weights: Path, device: torch.device) -> Any:
    """The model in evaluation mode on its device; ValueError for weights that are not finite."""
    require_finite_weights(model, f"{weights}: the weights")
    return model.eval().requires_grad_(False).to(device)


def identity_of(root: Path, weights: Path) -> dict[str, Any]:
    """Name of the folder, hash of the weights, and one of all small text files beside them: plain JSON data."""
    settings = hashlib.sha256()  # of the model, the tokenizer and the image processor
    for path in sorted(path for path in root.iterdir() if path.suffix in (".json", ".txt") and path.is_file()):
        settings.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return {"model": root.resolve().name, "sha256": sha256_of(weights), "settings_sha256": settings.hexdigest()}


def pixels_of(processor: Any, images: UInt8[Tensor, "batch 3 height width"], device: torch.device) -> Tensor:
    """The images as a processor of transformers prepares them; ValueError for others than RGB bytes."""
    if images.dtype is not torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (batch, 3, height, width), got {images.dtype} {tuple(images.shape)}")
    prepared = processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
    return prepared["pixel_values"].to(device)


def device_of(name: str | None) -> torch.device:
    """The named device; None for CUDA where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
