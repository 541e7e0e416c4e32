"""The settings of networks in files: checked before anything is built, so that nothing slow or unsafe begins.

Nothing in a configuration may name code or something to be fetched; nothing may ask for more than its weights can fill; and
a setting with which this program would not compute what the network's own program computes is refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from tfmq_exp.denoisers.loading.scheduler_config import default_settings

UNETS: tuple[Any, ...] = (UNet2DModel, UNet2DConditionModel)
AUTOENCODERS: tuple[Any, ...] = (VQModel, AutoencoderKL)
TEXT_MODELS: tuple[Any, ...] = (CLIPTextModel,)

# Notes of the libraries about a file, which change nothing.
NOTES = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
TEXT_NOTES = frozenset({"_name_or_path", "transformers_version", "architectures", "model_type", "dtype"})
# Settings with which the libraries would import or fetch code, or replace plain layers.
CODE = frozenset({"auto_map", "attn_implementation", "quantization_config", "custom_pipelines"})
SIDES = ("Down", "Up")
BLOCKS = ("{}Block2D", "Attn{}Block2D", "CrossAttn{}Block2D", "Resnet{}sampleBlock2D")
NONE, OFF = frozenset({None}), frozenset({False, None})
# The supported values of settings, where not everything that diffusers has is supported.
UNET_CHOICES: dict[str, frozenset[Any]] = {
    **dict.fromkeys(("down_block_types", "up_block_types"), frozenset(b.format(s) for b in BLOCKS for s in SIDES)),
    "mid_block_type": frozenset({None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"}),
    "resnet_time_scale_shift": frozenset({"default", "scale_shift"}),
    "time_embedding_type": frozenset({"positional", "fourier", "learned"}),
    "attention_type": frozenset({"default"}),
    "dual_cross_attention": OFF,  # the installed diffusers cannot run it
    "class_embeddings_concat": OFF,
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type"), NONE),
    **dict.fromkeys(("encoder_hid_dim_type", "encoder_hid_dim", "time_cond_proj_dim"), NONE),
}
# The latents of a first stage are what its decoder takes but for one factor, and it makes images.
STAGE_CHOICES = {"latents_mean": NONE, "latents_std": NONE, "out_channels": frozenset({1, 3})}
CHOICES: dict[Any, tuple[Mapping[str, frozenset[Any]], str]] = {
    **dict.fromkeys(UNETS, (UNET_CHOICES, "a UNet")),
    **dict.fromkeys(AUTOENCODERS, (STAGE_CHOICES, "a first stage")),
    # the UNet is conditioned on all of its words
    **dict.fromkeys(TEXT_MODELS, ({"use_attention_mask": OFF}, "a text model")),
}
LAYERS = (
    *("layers_per_block", "num_hidden_layers"),
    *("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
)
MOST_LAYERS = 1024  # in all; the largest published networks have about a hundred
MOST_LEVELS = 16
LARGEST_SIDE = 8192  # of a sample, in pixels or latents
# Below these a file that is too short is not the settings' fault: it is damaged, or something else.
WIDE, LARGE = 2**20, 2**30  # channels or words of one layer; weights of a network


def numbers(value: Any) -> list[float]:
    """The numbers in nested lists; truth values are none."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, int | float) and not isinstance(leaf, bool)]


def check_code(file: Path, config: Mapping[str, Any]) -> None:
    """ValueError for a setting that names code, or something to be fetched, at any depth."""
    for key, value in config.items():
        if value is not None and (key in CODE or (key.startswith("_") and key not in NOTES)):
            raise ValueError(f"{file}: {key}={value!r:.80} is refused: a folder may not say which code is used")
        if isinstance(value, Mapping):
            check_code(file, value)


def check_sizes(kind: Any, config: Mapping[str, Any], available: int, most_layers: int) -> None:
    """ValueError, by their keys, for settings of a network that is not built in little time; see `empty_network`."""
    defaults = default_settings(kind)
    for key, value in config.items():
        if isinstance(value, list) and len(value) > MOST_LEVELS:
            raise ValueError(f"{key} has {len(value)} entries; a network has at most {MOST_LEVELS} levels")
        limit = LARGEST_SIDE if key == "sample_size" else MOST_LAYERS if key in LAYERS else max(available, WIDE)
        default = defaults.get(key)
        wrong = any(not 0 <= number <= limit for number in numbers(value)) and not key.endswith("_token_id")
        nested = isinstance(value, list) and any(isinstance(part, list) for part in value) and key not in LAYERS
        switch = isinstance(default, bool) and not all(isinstance(leaf, bool | None) for leaf in tree_leaves(value))
        real = isinstance(default, float) and type(value) not in (int, float)
        if wrong or nested or switch or real or isinstance(value, Mapping):
            right = "true or false" if switch else f"numbers from 0 to {limit}"
            raise ValueError(f"{key}={value!r:.80} cannot be: expected {right}")
    levels = len(tree_leaves(config.get("down_block_types", 0)))
    counts = {key: config[key] for key in LAYERS if key in config}
    layers = levels * math.prod(max([1, *numbers(value)]) for value in counts.values())
    if layers > most_layers:
        chosen = ", ".join(f"{key}={value!r:.80}" for key, value in counts.items())
        raise ValueError(f"{chosen} make {layers:.0f} layers; expected at most {most_layers}")


def empty_network(
    kind: Any, config: Mapping[str, Any], available: int, most_layers: int = MOST_LAYERS, tolerated: int = 0
) -> Any:
    """Build a network on the meta device, if its settings are possible.

    Args:
        kind: its class; a setting that is a switch or a real number by default stays one.
        config: its settings by name.
        available: weights that the files can hold.
        most_layers: in all blocks together.
        tolerated: weights that are accepted whatever the files can hold.

    Raises:
        ValueError: settings that cannot be, do not go together, or describe more weights than there are; by their keys.
    """
    check_sizes(kind, config, available, most_layers)
    try:
        with torch.device("meta"):
            network = kind(CLIPTextConfig(**config)) if kind in TEXT_MODELS else kind.from_config(dict(config))
    except Exception as error:  # settings that do not go together fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"no {kind.__name__} can be built of these settings: {reason}") from error
    needed = sum(value.numel() for value in network.state_dict().values())
    if needed > max(available, tolerated):
        sizes = {key: max(numbers(value), default=0) for key, value in config.items() if not key.endswith("_token_id")}
        largest = max(sizes, key=sizes.__getitem__)
        found = f"its settings describe {needed} weights, their files have room for {available}"
        raise ValueError(f"{found}; the largest setting is {largest}={config[largest]!r:.80}")
    return network


def check_known(kind: Any, config: Mapping[str, Any]) -> None:
    """ValueError for a setting that a class of diffusers does not know and would ignore."""
    known = default_settings(kind).keys() | NOTES
    if unknown := [key for key, value in config.items() if key not in known and value not in (None, False)]:
        found = f"{unknown[0]!r} (={config[unknown[0]]!r:.80})"
        raise ValueError(f"{kind.__name__} has no setting {found}: another version's network?")


def check_choices(kind: Any, config: Mapping[str, Any]) -> None:
    """ValueError for a setting that the class does not know and would ignore, or with a value that is not supported."""
    if kind not in TEXT_MODELS:  # transformers notes much that is not the network's
        check_known(kind, config)
    choices, network = CHOICES[kind]
    for key, supported in choices.items():
        value = config.get(key)
        found = value if isinstance(value, list | tuple) else (value,)
        # a key that is not there has its default, and every default is supported
        if key in config and not all(isinstance(v, str | int | None) and v in supported for v in found):
            expected = ", ".join(sorted({str(choice) for choice in supported}))
            raise ValueError(f"{network} with {key}={value!r:.80} is not supported; expected {expected}")


def check_channels(network: Any) -> None:
    """ValueError unless a UNet returns as many channels as it takes, or twice as many, with a learned variance."""
    taken, returned = network.config["in_channels"], network.config["out_channels"]
    if returned not in (taken, 2 * taken):
        wrong = f"expected out_channels={taken}, or {2 * taken} with a learned variance"
        if taken > returned:
            wrong = f"more channels than the {returned} of the noisy sample (inpainting, or a condition beside it): not supported"
        raise ValueError(f"in_channels={taken}, out_channels={returned}: {wrong}")


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a `sample_size`; ValueError if it does not say them."""
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in pair):
        expected = f"a whole number from 1 to {LARGEST_SIDE} or two, height and width"
        raise ValueError(f"sample_size must be {expected}, got {size!r:.80}")
    return pair


def checked_network(file: Path, config: Mapping[str, Any], classes: tuple[Any, ...], available: int) -> Any:
    """Check the content of a network's configuration file, and build it on the meta device; `available` bytes are its weights.

    Raises:
        ValueError: another class, or a setting that is not safe, cannot be, or is not supported; by its key.
    """
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    kinds = {kind.__name__: kind for kind in classes}
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{file.parent} holds a network of class {name}; expected {' or '.join(kinds)}")
    kind, foreign = kinds[name], NOTES
    if kind in TEXT_MODELS:  # its own settings alone
        foreign = (config.keys() - CLIPTextConfig().to_dict().keys()) | TEXT_NOTES
    check_code(file, config)
    try:
        check_choices(kind, config)
        own = {key: value for key, value in config.items() if key not in foreign}
        network = empty_network(kind, own, available, tolerated=LARGE)
        if kind in UNETS:
            check_channels(network)
            sides(config.get("sample_size"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return network
