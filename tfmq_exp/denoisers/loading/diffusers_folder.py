"""A denoiser from a folder of diffusers' layout: a whole pipeline, or a UNet with its scheduler's configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel, VQModel
from torch import nn
from transformers import CLIPTextModel

from tfmq_exp.core.files import read_json
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.denoiser import ConditionEncoder, DenoiserParts, FirstStage, NoConditions, Pixels
from tfmq_exp.denoisers.families.unet import attentions, set_heads
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder, check_latent_scale
from tfmq_exp.denoisers.loading.checkpoint import assign_weights, differences
from tfmq_exp.denoisers.loading.condition_encoders import TextEncoder, assign_text_weights, read_tokenizer
from tfmq_exp.denoisers.loading.network_config import AUTOENCODERS, TEXT_MODELS, UNETS, checked_network, sides
from tfmq_exp.denoisers.loading.network_folder import ADAPTER, present_names, reason_of
from tfmq_exp.denoisers.loading.scheduler_config import CONFIG, read_index, scheduler_file, training_noise
from tfmq_exp.denoisers.loading.weight_files import read_state, weight_files
from tfmq_exp.denoisers.originals.compvis_checkpoint import training_schedule, unet_architecture
from tfmq_exp.denoisers.originals.compvis_unet import build_unet

CLASSES = {"unet": UNETS, "first_stage": AUTOENCODERS, "text_encoder": TEXT_MODELS}
SUBFOLDERS = {"unet": ("unet",), "first_stage": ("vqvae", "vae"), "text_encoder": ("text_encoder",)}
# What a pipeline may list, too: tokenizer and scheduler are read elsewhere, the others change no image of text or noise.
OTHERS = ("tokenizer", "scheduler", "safety_checker", "feature_extractor", "image_encoder")


def component_folders(path: Path) -> dict[str, Path]:
    """The folders of the networks that are read.

    Raises:
        FileNotFoundError: no UNet, in `unet/` or in the folder itself, or a network that the pipeline's index lists alone.
        ValueError: the index lists a network that is not read, such as a ControlNet: images would lack it.
    """
    index = read_index(path)
    listed = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    for name, kind in listed.items():
        if kind is not None and name not in (*OTHERS, *sum(SUBFOLDERS.values(), ())):
            pipeline = f"{path / 'model_index.json'}: {name} ({kind}) of a {index.get('_class_name')}"
            raise ValueError(f"{pipeline} is not supported; without it the images would be others")
    found: dict[str, Path] = {}
    for component, names in SUBFOLDERS.items():
        if present := [path / name for name in names if (path / name).is_dir()]:
            found[component] = present[0]
        elif component == "unet" and (path / "config.json").is_file():
            found[component] = path
        elif component == "unet":
            entries = sorted(f"{file.name}/" if file.is_dir() else file.name for file in path.iterdir())
            there = f"expected a folder of diffusers' layout; there is {', '.join(entries[:12]) or 'nothing'}"
            raise FileNotFoundError(f"no unet/ in {path}, and no config.json in it: {there}")
        elif lacking := [name for name in names if (index.get(name) or [None])[0] is not None]:
            raise FileNotFoundError(f"{path} lacks the folder {lacking[0]}/, which its model_index.json lists")
    return found


class Component(NamedTuple):
    """One network of a folder, its settings checked: its configuration, and itself on the meta device."""

    folder: Path
    config: Mapping[str, Any]
    network: Any


def open_component(folder: Path, classes: Any) -> Component:
    """A network's folder, its configuration checked before weights are read; errors are those of `DiffusersFolder`."""
    if (folder / ADAPTER).exists():
        raise ValueError(f"{folder / ADAPTER}: adapters are not supported: merge it into the weights")
    available = sum(weights.stat().st_size for weights in weight_files(folder))
    config = read_json(folder / "config.json")
    return Component(folder, config, checked_network(folder / "config.json", config, classes, available))


def load_component(component: Component, name: str) -> Any:
    """The network with its weights; ValueError, with its name, where they do not fit or are not finite."""
    folder, _, network = component
    state = read_state(folder)
    try:
        if isinstance(network, CLIPTextModel):
            assign_text_weights(network, state)
        else:
            assign_weights(network, present_names(state, network.state_dict().keys()))
        if computed := [name for name, buffer in network.named_buffers() if buffer.is_meta]:
            raise ValueError(f"it has numbers that are in no file ({computed[0]}), which is not supported")
    except Exception as error:  # unfit configurations fail in any way
        raise ValueError(f"{folder} cannot be loaded: {reason_of(error)}") from error
    require_finite_weights(network, f"{folder}: the weights of {name}")
    return network


def load_first_stage(component: Component, decode_rows: int) -> LatentDecoder:
    """The autoencoder with its weights, and the scale of its latents."""
    folder, config, _ = component
    check_latent_scale(config, folder / "config.json")
    network = load_component(component, "first_stage")
    if shift := network.config.get("shift_factor"):
        raise ValueError(f"{folder}: shift_factor={shift} is not supported")
    # diffusers' default is not that of a file without the setting: LDM's VQ models are not scaled
    default = 1.0 if isinstance(network, VQModel) else network.config["scaling_factor"]
    return LatentDecoder(network, config.get("scaling_factor", default), decode_rows)


class DiffusersFolder:
    """A folder with `unet/`, and where the model has them `vqvae/` or `vae/`, `scheduler/`, `text_encoder/`, `tokenizer/`.

    Or the UNet's `config.json` and `scheduler_config.json` in the folder itself. Its configurations are checked before weights
    are read.

    Raises:
        FileNotFoundError: a component lacks its configuration or its weights.
        ValueError: a component, or a setting that is not safe, cannot be, or is not supported, by its key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.components: dict[str, Component] = {}
        for name, folder in component_folders(path).items():
            self.components[name] = open_component(folder, CLASSES[name])

    @property
    def architecture(self) -> dict[str, Any]:
        """The configurations of the networks, without what the libraries note about themselves."""
        return {
            name: {k: v for k, v in part.config.items() if not k.startswith("_") and k != "transformers_version"}
            for name, part in self.components.items()
        }

    def network(self, name: str) -> Any:
        """A network with its weights, float32; strictly, by no reader but our own."""
        return load_component(self.components[name], name)

    def load(self, config: Mapping[str, Any] | None, *, tokenizer: Path | None, decode_rows: int) -> DenoiserParts:
        """Read the folder; numbers of heads are those of `config`, an architecture of the original program, if it is given.

        Raises:
            FileNotFoundError: something that the model needs is not there.
            ValueError: something is damaged, of another kind, or does not fit `config`.
        """
        file = scheduler_file(self.path)
        if file is None and config is None:
            raise FileNotFoundError(f"no scheduler/{CONFIG} in {self.path}, and no `config` that says the noise")
        noise = training_noise(file) if file else training_schedule(config or {})
        network = self.network("unet")
        if config is not None:
            apply_heads(network, config)
        encoder, stage = self._encoder(network, tokenizer), self._first_stage(decode_rows)
        shape = (network.config["in_channels"], *sides(network.config["sample_size"]))
        return DenoiserParts(network, shape, noise, encoder, stage)

    def _encoder(self, network: Any, tokenizer: Path | None) -> ConditionEncoder:
        if isinstance(network, UNet2DModel):
            return NoConditions()
        if "text_encoder" not in self.components:
            raise FileNotFoundError(f"no text_encoder/ in {self.path}, which its UNet2DConditionModel needs")
        words = read_tokenizer(tokenizer or self.path / "tokenizer")
        return TextEncoder(self.network("text_encoder"), words)

    def _first_stage(self, decode_rows: int) -> FirstStage:
        if "first_stage" not in self.components:
            for file in sorted(self.path.glob("*/config.json")):  # its latents would pass for pixels
                if str(read_json(file).get("_class_name")).startswith(("Autoencoder", "VQModel")):
                    expected = "expected it in vqvae/ or vae/: rename the folder"
                    raise ValueError(f"{file.parent} holds an autoencoder; {expected}")
            return Pixels()
        return load_first_stage(self.components["first_stage"], decode_rows)


def apply_heads(network: nn.Module, config: Mapping[str, Any]) -> None:
    """Set an original architecture's numbers of heads, not all of which a diffusers configuration can express."""
    with torch.device("meta"):
        expected = build_unet(unet_architecture(config))
    if problems := differences(expected, network.state_dict()):
        raise ValueError(f"the UNet in the folder is not the one of `config`: {'; '.join(problems)}")
    modules = attentions(network)
    for name, attention in attentions(expected).items():
        set_heads(modules[name], attention.heads)
