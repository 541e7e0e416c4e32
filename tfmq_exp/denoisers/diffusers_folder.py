"""A denoiser from a folder of diffusers' layout: a whole pipeline, or a UNet with its scheduler's configuration."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel, VQModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from tfmq_exp.denoisers import compvis, original
from tfmq_exp.denoisers.denoiser import ConditionEncoder, FirstStage, NoConditions, Pixels
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.compvis_checkpoint import Parts
from tfmq_exp.denoisers.loading.network_config import (
    AUTOENCODERS,
    TEXT_MODELS,
    UNETS,
    check_network,
    class_of,
    sides,
    text_settings,
)
from tfmq_exp.denoisers.loading.scheduler_config import CONFIG, read_json, scheduler_file, training_noise
from tfmq_exp.denoisers.loading.state_dict import assign_weights, differences
from tfmq_exp.denoisers.loading.text_encoder import TextEncoder, load_text_model, read_tokenizer
from tfmq_exp.denoisers.loading.weight_files import read_state, weight_files
from tfmq_exp.denoisers.unet import attentions, set_heads

# What older versions of diffusers called the layers of attention in autoencoders.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CLASSES = {"unet": UNETS, "first_stage": AUTOENCODERS, "text_encoder": TEXT_MODELS}
# What a pipeline may list beside: tokenizer and scheduler are read elsewhere, the others change no image of text or noise.
OTHERS = frozenset({"tokenizer", "scheduler", "safety_checker", "feature_extractor", "image_encoder"})
ADAPTER = "adapter_config.json"  # weights that other programs would put on top of the folder's


def unet_folder(path: Path) -> Path:
    """Where the UNet is: in `unet/`, or in the folder itself; FileNotFoundError if in neither."""
    if (path / "unet").is_dir():
        return path / "unet"
    if not (path / "config.json").is_file():
        there = sorted(f"{file.name}/" if file.is_dir() else file.name for file in path.iterdir())
        raise FileNotFoundError(
            f"no unet/ in {path}, and no config.json in it: expected a folder of diffusers' layout, or the path of a "
            f"checkpoint; there is {', '.join(there[:12]) or 'nothing'}"
        )
    return path


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


def check_components(path: Path) -> None:
    """ValueError if the index of the pipeline lists a network that is not read, such as a ControlNet: images would lack it."""
    file = path / "model_index.json"
    index = read_json(file) if file.is_file() else {}
    known = OTHERS | {"unet", "vqvae", "vae", "text_encoder"}
    listed = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    if unknown := [name for name, value in listed.items() if name not in known and value[1] is not None]:
        name = unknown[0]
        raise ValueError(
            f"{file}: {name} ({listed[name][1]}) of a {index.get('_class_name')} is not supported; without it the images would "
            "be others"
        )


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


def present_name(name: str, expected: Collection[str]) -> str:
    """The name that a parameter has today, where the network knows it by another than the file."""
    outer, _, leaf = name.rpartition(".")
    outer, _, layer = outer.rpartition(".")
    present = f"{outer}.{FORMER_NAMES.get(layer, layer)}.{leaf}"
    return present if name not in expected and present in expected else name


def check(path: Path) -> None:
    """Look at the configurations in a folder, before weights are read.

    Raises:
        FileNotFoundError: a component lacks its configuration or its weights.
        ValueError: a component, or a setting that is not safe, cannot be, or is not supported, by its key; see `settings`.
    """
    check_components(path)
    for name, folder in folders(path).items():
        if (folder / ADAPTER).exists():
            raise ValueError(f"{folder / ADAPTER}: adapters are not supported: merge it into the weights")
        file = folder / "config.json"
        available = sum(weights.stat().st_size for weights in weight_files(folder))
        check_network(file, read_json(file), CLASSES[name], available)


def build(kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A network of diffusers with its weights, which it takes over; ValueError where they do not fit its configuration."""
    with torch.device("meta"):
        network = kind.from_config(config)
    expected = network.state_dict().keys()
    assign_weights(network, {present_name(name, expected): value for name, value in state.items()})
    if computed := [name for name, buffer in network.named_buffers() if buffer.is_meta]:
        raise ValueError(f"it has numbers that are in no file ({computed[0]}), which is not supported")
    return network


def pretrained(folder: Path, classes: tuple[Any, ...]) -> Any:
    """The network in a folder, which must be of one of these classes, float32; strictly, by no reader but our own.

    Raises:
        FileNotFoundError: no configuration, or not all weights.
        ValueError: another class, or weights that are damaged or do not fit the configuration.
    """
    config = read_json(folder / "config.json")
    kind = class_of(folder / "config.json", config, classes)
    state = read_state(folder)
    try:
        return load_text_model(text_settings(config), state) if kind is CLIPTextModel else build(kind, config, state)
    except Exception as error:  # unfit configurations fail in whatever way they lead to
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        reason = " ".join(said.split())[:300]
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error


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
    return TextEncoder(pretrained(folder, TEXT_MODELS), words)


def check_no_autoencoder(path: Path) -> None:
    """ValueError if a subfolder holds an autoencoder under a name that is not looked for: latents would pass for pixels."""
    for file in sorted(path.glob("*/config.json")):
        if str(read_json(file).get("_class_name")).startswith(("Autoencoder", "VQModel")):
            raise ValueError(f"{file.parent} holds an autoencoder; expected it in vqvae/ or vae/: rename the folder")


def read_first_stage(path: Path, decode_rows: int) -> FirstStage:
    """What turns latents into images: a VQ model or a KL autoencoder, or nothing where there is none."""
    folder = component(path, "vqvae", "vae")
    if folder is None:
        check_no_autoencoder(path)
        return Pixels()
    network = pretrained(folder, AUTOENCODERS)
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
    unet = pretrained(unet_folder(path), UNETS)
    if config is not None:
        apply_heads(unet, config)
    encoder, stage = read_encoder(path, unet, tokenizer), read_first_stage(path, decode_rows)
    return Parts(unet, sample_shape(unet), noise, encoder, stage)
