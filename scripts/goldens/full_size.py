"""The published models' parameters, by name and shape alone, in the networks that our configurations describe."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from goldens.comparing import EXACT, Group, Record
from goldens.families import AVERAGING, CONDITIONS, FIRST_STAGE, UNET, read_json
from tfmq_exp.denoisers.loading import autoencoder
from tfmq_exp.denoisers.loading.checkpoint import EMA, ema_names
from tfmq_exp.denoisers.loading.condition_encoders import VIT_L_14, load_text_model
from tfmq_exp.denoisers.originals import compvis_checkpoint, compvis_unet

MANIFESTS = "fullsize_key_manifests.json.gz"
CONF = Path(__file__).parents[2] / "conf"
# which of conf/model has the weights of a manifest
MODELS = {
    "ddim_cifar10": "ddim_cifar10",
    "ldm_celeba": "ldm_celebahq",
    "ldm_cin256_v2": "ldm_imagenet",
    "ldm_ffhq": "ldm_ffhq",
    "ldm_lsun_beds": "ldm_bedroom",
    "ldm_lsun_churches": "ldm_church",
    "sd_v1": "sd_v1_4",
}
TRAINING = 1000  # timesteps, of every model: the length of the schedules that LDM keeps in its files


def architecture(name: str) -> dict[str, Any]:
    """Architecture of the model of a manifest, as a run would have it.

    Raises:
        ValueError: a manifest of another model.
    """
    if name not in MODELS:
        raise ValueError(f"there is no configuration of {name!r}, only of {', '.join(MODELS)}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"model={MODELS[name]}"]).model.denoiser.config
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def below(tensors: Mapping[str, list[int]], prefix: str) -> dict[str, Tensor]:
    """The parameters below a prefix, without numbers in them."""
    found = {key: shape for key, shape in tensors.items() if key.startswith(prefix) and not key.startswith(EMA)}
    return {key.removeprefix(prefix): torch.empty(shape, device="meta") for key, shape in found.items()}


def networks(config: dict[str, Any], tensors: Mapping[str, list[int]]) -> Iterator[tuple[str, nn.Module]]:
    """Every network of a model with what the file has for it: the prefix of its names, and the network.

    Raises:
        ValueError: parameters that are missing, unknown or of another shape.
    """
    prefix = "" if compvis_checkpoint.is_ddim(config) else UNET
    yield prefix, compvis_unet.load_unet(compvis_checkpoint.unet_architecture(config), below(tensors, prefix))
    if prefix:
        params = compvis_checkpoint.at(config, "model.params")
        yield FIRST_STAGE, autoencoder.load_autoencoder(params["first_stage_config"], below(tensors, FIRST_STAGE), 1.0)
        stage = params.get("cond_stage_config", compvis_checkpoint.UNCONDITIONAL)
        if "FrozenCLIPEmbedder" in str(stage):
            text = f"{CONDITIONS}transformer."
            yield text, load_text_model(config.get("clip_text_config", VIT_L_14), below(tensors, text))
        elif stage != compvis_checkpoint.UNCONDITIONAL:
            rows = nn.Embedding(stage["params"]["n_classes"], stage["params"]["embed_dim"], device="meta")
            rows.load_state_dict(below(tensors, f"{CONDITIONS}embedding."), assign=True)
            yield f"{CONDITIONS}embedding.", rows


def check_model(name: str, manifest: Record) -> Group:
    """Every key of one model: strictly loaded, an averaged copy of such a key, or a buffer of the schedule."""
    group, tensors = Group(f"full size {name}: keys, parameters", EXACT), manifest["tensors"]
    counts = {UNET: "unet_params", "": "unet_params", FIRST_STAGE: "first_stage_params"}
    placed: set[str] = set()
    try:
        for prefix, network in networks(architecture(name), tensors):
            mapped = {key for key in tensors if key.startswith(prefix) and not key.startswith(EMA)}
            placed |= mapped
            # positions 0, 1, .. are no parameters
            golden = sum(math.prod(tensors[key]) for key in mapped if not key.endswith("position_ids"))
            ours = sum(parameter.numel() for parameter in network.parameters())
            group.compare(ours, golden)
            if prefix in counts:
                group.compare(ours, manifest[counts[prefix]])
    except (ValueError, RuntimeError) as error:
        group.compare(0, 1)
        group.note = str(error)
        return group
    copies = {ema: key for key, ema in ema_names(key for key in placed if key.startswith(UNET)).items()}
    if averaged := {key for key in tensors if key.startswith(EMA)}:
        same = [key for key in averaged if key in copies and tensors[key] == tensors[copies[key]]]
        group.compare(len(same), len(copies))
        placed |= {*same, *AVERAGING}
    placed |= {key for key, shape in tensors.items() if shape == [TRAINING] and "." not in key} | {"scale_factor"}
    group.compare(len(placed & set(tensors)), len(tensors))
    left = sorted(set(tensors) - placed)
    group.note = f"without a place: {', '.join(left[:3])}" if left else f"{len(tensors)} keys"
    return group


def check_full_size(folder: Path) -> Iterator[Group]:
    """Every manifest of a folder."""
    for name, manifest in read_json(folder / MANIFESTS).items():
        yield check_model(name, manifest)
