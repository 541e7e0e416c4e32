"""A denoiser from a folder of diffusers' layout: a whole pipeline, or a UNet with its scheduler's configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn
from transformers import CLIPTextModel

from tfmq_exp.denoisers import compvis, original
from tfmq_exp.denoisers.assigning import differences
from tfmq_exp.denoisers.denoiser import ConditionEncoder, FirstStage, NoConditions, Pixels
from tfmq_exp.denoisers.first_stage import LatentDecoder
from tfmq_exp.denoisers.original import Parts
from tfmq_exp.denoisers.scheduler_config import CONFIG, read_json, scheduler_file, training_noise
from tfmq_exp.denoisers.text_encoder import TextEncoder, read_tokenizer
from tfmq_exp.denoisers.unet import attentions, set_heads

UNETS: tuple[Any, ...] = (UNet2DModel, UNet2DConditionModel)
AUTOENCODERS: tuple[Any, ...] = (VQModel, AutoencoderKL)
WEIGHTS = ("*.safetensors", "*.bin")  # the second only where there are none of the first
# Conditions inside the UNet, which are not supported.
INNER_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")


def unet_folder(path: Path) -> Path:
    """Where the UNet is: in `unet/`, or in the folder itself."""
    return path / "unet" if (path / "unet").is_dir() else path


def component(path: Path, *names: str) -> Path | None:
    """The first of these subfolders that is there; None if none is, and the pipeline has none.

    Raises:
        FileNotFoundError: the index of the pipeline lists one that is not there.
    """
    for name in names:
        if (path / name).is_dir():
            return path / name
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    if listed := [name for name in names if (index.get(name) or [None])[0] is not None]:
        raise FileNotFoundError(f"{path} lacks the folder {listed[0]}/, which its model_index.json lists")
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files with weights that are read from one component's folder; not those of a variant such as fp16."""
    for pattern in WEIGHTS:
        if found := sorted(file for file in folder.glob(pattern) if "." not in file.stem):
            return found
    raise FileNotFoundError(f"no weights in {folder}: expected *.safetensors or *.bin")


def folders(path: Path) -> dict[str, Path]:
    """The components whose weights are read."""
    found = {"unet": unet_folder(path), "first_stage": component(path, "vqvae", "vae")}
    found["text_encoder"] = component(path, "text_encoder")
    return {name: folder for name, folder in found.items() if folder is not None}


def architecture(path: Path) -> dict[str, Any]:
    """The configurations of these components, without what diffusers notes about itself."""
    configs = {name: read_json(folder / "config.json") for name, folder in folders(path).items()}
    return {
        name: {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
        for name, config in configs.items()
    }


def pretrained(folder: Path, classes: tuple[Any, ...], **options: Any) -> Any:
    """The network in a folder, which must be of one of these classes, float32; strictly, from local files.

    Pickled weights are read by torch.load with weights_only=True, which runs nothing.

    Raises:
        FileNotFoundError: no configuration.
        ValueError: another class, or weights that are damaged or do not fit the configuration.
    """
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    kinds = {kind.__name__: kind for kind in classes}
    if name not in kinds:
        raise ValueError(f"{folder} holds a network of class {name}; expected {' or '.join(kinds)}")
    weight_files(folder)
    options |= {"local_files_only": True, "output_loading_info": True}
    try:
        with torch.random.fork_rng(devices=[]):  # they draw weights before they read them
            network, info = kinds[name].from_pretrained(str(folder), **options)
    except Exception as error:  # damaged files fail in whatever way they lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    problems = [
        f"{len(names)} {kind.replace('_', ' ')}, first {min(map(str, names))}" for kind, names in info.items() if names
    ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit the configuration: {'; '.join(problems)}")
    return network.float().eval().requires_grad_(False)


def apply_heads(unet: nn.Module, config: Mapping[str, Any]) -> None:
    """The numbers of heads of an original architecture, not all of which a diffusers configuration can express.

    Raises:
        ValueError: the architecture is another one.
    """
    with torch.device("meta"):
        expected = compvis.build(original.unet_architecture(config))
    if problems := differences(expected, unet.state_dict()):
        raise ValueError(f"the UNet in the folder is not the one of `config`: {'; '.join(problems)}")
    modules = attentions(unet)
    for name, attention in attentions(expected).items():
        set_heads(modules[name], attention.heads)


def sample_shape(unet: Any) -> tuple[int, int, int]:
    """Channels, height and width, from the UNet's configuration; ValueError if it does not say."""
    size = unet.config["sample_size"]
    if size is None:
        raise ValueError("the configuration of the UNet does not say its sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config["in_channels"], height, width


def read_encoder(path: Path, unet: Any, tokenizer: Path | None) -> ConditionEncoder:
    """What encodes the conditions of this UNet."""
    if inner := [key for key in INNER_CONDITIONS if unet.config.get(key) is not None]:
        raise ValueError(f"a UNet with {inner[0]}={unet.config[inner[0]]!r} is not supported")
    if isinstance(unet, UNet2DModel):
        return NoConditions()
    folder = component(path, "text_encoder")
    if folder is None:
        raise FileNotFoundError(f"no text_encoder/ in {path}, which its UNet2DConditionModel is conditioned with")
    words = read_tokenizer(tokenizer or path / "tokenizer")
    return TextEncoder(pretrained(folder, (CLIPTextModel,)), words)


def read_first_stage(path: Path, decode_rows: int) -> FirstStage:
    """What turns latents into images: a VQ model or a KL autoencoder, or nothing where there is none."""
    folder = component(path, "vqvae", "vae")
    if folder is None:
        return Pixels()
    network = pretrained(folder, AUTOENCODERS, low_cpu_mem_usage=False)
    if network.config.get("shift_factor"):
        raise ValueError(f"{folder}: shift_factor={network.config['shift_factor']} is not supported")
    # what the file does not say is not diffusers' default: LDM's VQ models are not scaled
    default = 1.0 if isinstance(network, VQModel) else network.config["scaling_factor"]
    return LatentDecoder(network, read_json(folder / "config.json").get("scaling_factor", default), decode_rows)


def load(path: Path, config: Mapping[str, Any] | None, *, tokenizer: Path | None, decode_rows: int) -> Parts:
    """Read a folder.

    Args:
        path: with `unet/`, and where the model has them `vqvae/` or `vae/`, `scheduler/`, `text_encoder/`, `tokenizer/`;
            or with the UNet's config.json and scheduler_config.json themselves.
        config: architecture in the layout of the original program, for numbers of heads; None trusts the folder.
        tokenizer: another folder of CLIP's vocabulary than the one inside.
        decode_rows: how many images the first stage decodes together.

    Raises:
        FileNotFoundError: something that the model needs is not there.
        ValueError: something that is there is damaged, of another kind, or does not fit `config`.
    """
    file = scheduler_file(path)
    if file is None and config is None:
        raise FileNotFoundError(f"no scheduler/{CONFIG} in {path}, and no `config` that says the noise")
    noise = training_noise(file) if file else original.schedule(config or {})
    unet = pretrained(unet_folder(path), UNETS, low_cpu_mem_usage=False)
    if config is not None:
        apply_heads(unet, config)
    encoder, stage = read_encoder(path, unet, tokenizer), read_first_stage(path, decode_rows)
    return Parts(unet, sample_shape(unet), noise, encoder, stage)
