"""The entry: pretrained denoisers from original checkpoints and diffusers folders. Nothing is ever downloaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tfmq_exp.core.file_kind import instead_of_text, kind_of, why_missing
from tfmq_exp.core.files import hash_of_json, sha256_of
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.loading.condition_encoders import TextEncoder, tokenizer_files
from tfmq_exp.denoisers.loading.diffusers_folder import DiffusersFolder, component_folders
from tfmq_exp.denoisers.loading.forward_check import check_forward
from tfmq_exp.denoisers.loading.weight_files import weight_files
from tfmq_exp.denoisers.originals.compvis_checkpoint import load_compvis

LDM = "the model zoo of github.com/CompVis/latent-diffusion"
# Model -> the file, and its publisher, for the message when it is missing. docs/checkpoints.md has the same with mirrors.
PUBLISHED = {
    "ddim_cifar10": ("model-790000.ckpt of ema_diffusion_cifar10_model", "github.com/pesser/pytorch_diffusion"),
    "ldm_bedroom": ("model.ckpt of lsun_bedrooms.zip", LDM),
    "ldm_church": ("model.ckpt of lsun_churches.zip", LDM),
    "ldm_celebahq": ("model.ckpt of celeba.zip", f"{LDM}, as diffusers folder huggingface.co/CompVis/ldm-celebahq-256"),
    "ldm_ffhq": ("model.ckpt of ffhq.zip", LDM),
    "ldm_imagenet": ("model.ckpt of cin256-v2", LDM),
    "sd_v1_4": ("sd-v1-4.ckpt", "huggingface.co/CompVis/stable-diffusion-v-1-4-original"),
}


def hash_weights(path: Path) -> str:
    """SHA-256 of a checkpoint; of a folder that of the hashes of the weight files that are read from it."""
    if path.is_file():
        return sha256_of(path)
    files = [file for folder in component_folders(path).values() for file in weight_files(folder)]
    return hash_of_json({file.relative_to(path).as_posix(): sha256_of(file) for file in files})


def read_architecture(config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any] | None:
    """An architecture, given itself or as the path of its YAML file."""
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


def load_denoiser(
    name: str,
    path: str | Path,
    config: Mapping[str, Any] | str | Path | None,
    ema: bool,
    tokenizer: str | Path | None = None,
    sha256: str | None = None,
    decode_rows: int = 8,
) -> Denoiser:
    """Read a pretrained denoiser: float32, in evaluation mode, without gradients, on the CPU.

    Args:
        name: of the model, as results have it.
        path: an original checkpoint (LDM, Stable Diffusion 1, DDIM), or a folder of diffusers' layout.
        config: the architecture in the original program's layout, or the path of a YAML file with it. With a folder it
            may be None; given, it says the numbers of heads that diffusers' configurations cannot express (LSUN-Churches).
        ema: the UNet's weights averaged over training, which an original checkpoint may hold in addition.
        tokenizer: folder with CLIP's vocab.json and merges.txt, for models of text; a folder's own by default.
        sha256: expected hash of the weights: of the file, or of a folder as `hash_weights` counts it.
        decode_rows: images that the first stage decodes together; bounds its memory.

    Raises:
        FileNotFoundError: something that the model needs does not exist; the message says where it is published.
        ValueError: damaged, of another model, with other weights than expected, or not supported.
    """
    path, words = Path(path), None if tokenizer is None else Path(tokenizer)
    if not path.exists():
        source = (
            "expected {}, published at {}, or".format(*PUBLISHED[name]) if name in PUBLISHED else "give a checkpoint or"
        )
        advice = f"{source} a diffusers folder (docs/checkpoints.md); nothing is downloaded"
        raise FileNotFoundError(f"no weights of {name} at {path}{why_missing(path)}: {advice}")
    if not path.is_dir() and (kind := kind_of(path)):
        raise ValueError(f"{path}: {kind}")
    architecture = read_architecture(config)
    if path.is_file() and architecture is None:
        raise ValueError(f"{path} is one file: `config` must give its architecture")
    if path.is_dir() and ema:
        raise ValueError(f"{path} is a folder, which holds one set of weights: set ema=false")
    folder = DiffusersFolder(path) if path.is_dir() else None
    found = hash_weights(path)
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: damaged, or another file")
    try:
        if folder is not None:
            parts = folder.load(architecture, tokenizer=words, decode_rows=decode_rows)
        else:
            parts = load_compvis(path, architecture or {}, ema=ema, tokenizer=words, decode_rows=decode_rows)
        check_forward(parts)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    described = architecture if folder is None else [architecture, folder.architecture]
    settings = {"ema": ema, "architecture_sha256": hash_of_json(described)}
    if isinstance(parts.encoder, TextEncoder):
        files = tokenizer_files(words or path / "tokenizer")
        settings["tokenizer_sha256"] = hash_of_json({file.name: sha256_of(file) for file in files})
    return Denoiser(name=name, weights_sha256=found, settings=settings, **parts._asdict())
