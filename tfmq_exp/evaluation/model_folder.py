"""Folders of pretrained models that score images: what has to be there, and what identifies the scores that come of it."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq_exp.core.file_kind import kind_of, why_missing
from tfmq_exp.core.files import read_json, sha256_of
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.loading.condition_encoders import check_tokenizer
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


def check_settings(root: Path, *, tokenizer: bool) -> None:
    """ValueError for a `config.json` that names code, or a tokenizer of another kind than CLIP's."""
    check_code(root / "config.json", read_json(root / "config.json"))
    if tokenizer:
        check_tokenizer(root / "tokenizer_config.json")


def load_model(kind: Any, root: Path, device: torch.device) -> Any:
    """A model of transformers' class `kind` from `model.safetensors`, float32, without gradients."""
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    return ready(kind.from_pretrained(str(root), **options), root / "model.safetensors", device)


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


def device_of(name: str | None) -> torch.device:
    """The named device; None for CUDA where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
