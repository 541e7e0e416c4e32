"""A denoiser from a folder of diffusers' layout: a whole pipeline, or a UNet with its scheduler's configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel, VQModel
from torch import nn

from tfmq_exp.denoisers import compvis, original
from tfmq_exp.denoisers.assigning import differences
from tfmq_exp.denoisers.denoiser import ConditionEncoder, FirstStage, NoConditions, Pixels
from tfmq_exp.denoisers.first_stage import LatentDecoder
from tfmq_exp.denoisers.original import Parts
from tfmq_exp.denoisers.settings import AUTOENCODERS, TEXT_MODELS, UNETS, check_network, class_of, sides, text_config
from tfmq_exp.denoisers.text_encoder import TextEncoder, read_tokenizer
from tfmq_exp.denoisers.unet import attentions, set_heads

WEIGHTS = ("*.safetensors", "*.bin")  # the second only where there are none of the first
CLASSES = {"unet": UNETS, "first_stage": AUTOENCODERS, "text_encoder": TEXT_MODELS}
ADAPTER = "adapter_config.json"  # weights that transformers would put on top of the folder's, or fetch
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


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


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file; FileNotFoundError or ValueError if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: expected a folder of diffusers' layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: expected names with values")
    return content


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


def check(path: Path) -> None:
    """Look at the configurations in a folder, before weights are read.

    Raises:
        FileNotFoundError: a component lacks its configuration or its weights.
        ValueError: a setting that is not safe, cannot be, or is not supported, by its key; see `settings`.
    """
    for name, folder in folders(path).items():
        if (folder / ADAPTER).exists():
            raise ValueError(f"{folder / ADAPTER}: adapters are not supported: merge it into the weights")
        file = folder / "config.json"
        available = sum(weights.stat().st_size for weights in weight_files(folder))
        check_network(file, read_json(file), CLASSES[name], available)


def pretrained(folder: Path, classes: tuple[Any, ...], **options: Any) -> Any:
    """The network in a folder, which must be of one of these classes, float32; strictly, from local files.

    Pickled weights are read by torch.load with weights_only=True, which runs nothing.

    Raises:
        FileNotFoundError: no configuration.
        ValueError: another class, or weights that are damaged or do not fit the configuration.
    """
    kind = class_of(folder / "config.json", read_json(folder / "config.json"), classes)
    weight_files(folder)
    options |= {"local_files_only": True, "output_loading_info": True}
    try:
        with torch.random.fork_rng(devices=[]):  # they draw weights before they read them
            network, info = kind.from_pretrained(str(folder), **options)
    except Exception as error:  # damaged files fail in whatever way they lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    problems = [
        f"{len(names)} {kind.replace('_', ' ')}, first {min(map(str, names))}" for kind, names in info.items() if names
    ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit the configuration: {'; '.join(problems)}")
    return network.float().eval().requires_grad_(False)


def schedule(path: Path) -> dict[str, Any] | None:
    """The noise that the scheduler's configuration describes; None without one.

    Raises:
        ValueError: the network predicts something else than the noise, or betas that four numbers do not give.
    """
    files = [folder / "scheduler_config.json" for folder in (path / "scheduler", path)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    config = read_json(file)
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{file}: prediction_type must be epsilon, got {config['prediction_type']!r}")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{file}: trained_betas and rescale_betas_zero_snr are not supported")
    if lacking := [key for key in SCHEDULE if key not in config]:
        raise ValueError(f"{file} lacks {lacking[0]!r}")
    return {key: config[key] for key in SCHEDULE}


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
    return unet.config["in_channels"], *sides(unet.config["sample_size"])


def read_encoder(path: Path, unet: Any, tokenizer: Path | None) -> ConditionEncoder:
    """What encodes the conditions of this UNet."""
    if isinstance(unet, UNet2DModel):
        return NoConditions()
    folder = component(path, "text_encoder")
    if folder is None:
        raise FileNotFoundError(f"no text_encoder/ in {path}, which its UNet2DConditionModel is conditioned with")
    words = read_tokenizer(tokenizer or path / "tokenizer")
    config = text_config(read_json(folder / "config.json"))
    return TextEncoder(pretrained(folder, TEXT_MODELS, config=config), words)


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
    noise = schedule(path) or (original.schedule(config) if config is not None else None)
    if noise is None:
        raise FileNotFoundError(f"no scheduler/scheduler_config.json in {path}, and no `config` that says the noise")
    unet = pretrained(unet_folder(path), UNETS, low_cpu_mem_usage=False)
    if config is not None:
        apply_heads(unet, config)
    encoder, stage = read_encoder(path, unet, tokenizer), read_first_stage(path, decode_rows)
    return Parts(unet, sample_shape(unet), noise, encoder, stage)
