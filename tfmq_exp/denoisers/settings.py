"""What the configurations in a folder may say: checked before weights are read, so that nothing slow or unsafe begins.

Nothing in a configuration may name code or something to be fetched; nothing may ask for more than its weights can fill; and
what this program would not do as the network's own program does is refused.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

UNETS: tuple[Any, ...] = (UNet2DModel, UNet2DConditionModel)
AUTOENCODERS: tuple[Any, ...] = (VQModel, AutoencoderKL)
TEXT_MODELS: tuple[Any, ...] = (CLIPTextModel,)

# Notes of the libraries about a file, which change nothing.
NOTES = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})
# What the libraries would import, fetch, or put in the place of plain layers.
CODE = frozenset({"auto_map", "attn_implementation", "quantization_config", "custom_pipelines"})
# What a UNet's settings may be, where not everything that diffusers has is supported.
BLOCKS = frozenset(
    kind.format(side)
    for kind in ("{}Block2D", "Attn{}Block2D", "CrossAttn{}Block2D", "Resnet{}sampleBlock2D")
    for side in ("Down", "Up")
)
UNET_CHOICES: dict[str, frozenset[Any]] = {
    "down_block_types": BLOCKS,
    "up_block_types": BLOCKS,
    "mid_block_type": frozenset({None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"}),
    "resnet_time_scale_shift": frozenset({"default", "scale_shift"}),
    "time_embedding_type": frozenset({"positional", "fourier", "learned"}),
    "attention_type": frozenset({"default"}),
    "dual_cross_attention": frozenset({False, None}),  # the installed diffusers cannot run it
    "class_embeddings_concat": frozenset({False, None}),
    **dict.fromkeys(
        (
            *("class_embed_type", "num_class_embeds", "addition_embed_type"),
            *("encoder_hid_dim_type", "encoder_hid_dim", "time_cond_proj_dim"),
        ),
        frozenset({None}),
    ),
}
# Of a first stage: how latents are made from what the decoder takes, beyond one factor.
STAGE_CHOICES: dict[str, frozenset[Any]] = {
    **dict.fromkeys(("latents_mean", "latents_std"), frozenset({None})),
    "out_channels": frozenset({1, 3}),  # images
}
# Of a text model: which of its words the UNet hears.
TEXT_CHOICES: dict[str, frozenset[Any]] = {"use_attention_mask": frozenset({False, None})}

COUNTS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
)
MOST_LAYERS = 1024  # in all; the largest published networks have about a hundred
MOST_LEVELS = 16
LARGEST_SIDE = 8192  # of a sample, in pixels or latents
# Below these a file that is too short is not the settings' fault: it is damaged, or something else.
WIDE, LARGE = 2**20, 2**30  # channels or words of one layer; weights of a network


def class_of(file: Path, config: Mapping[str, Any], classes: tuple[Any, ...]) -> Any:
    """The class that a configuration names, which must be one of these; ValueError otherwise."""
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else None)
    kinds = {kind.__name__: kind for kind in classes}
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{file.parent} holds a network of class {name}; expected {' or '.join(kinds)}")
    return kinds[name]


def numbers(value: Any) -> Iterator[float]:
    """Every number in nested lists; truth values are none."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def check_code(file: Path, config: Mapping[str, Any]) -> None:
    """ValueError for a setting that names code, or something to be fetched, at any depth."""
    for key, value in config.items():
        if value is not None and (key in CODE or (key.startswith("_") and key not in NOTES)):
            raise ValueError(f"{file}: {key}={value!r:.80} is refused: a folder may not say which code is used")
        if isinstance(value, Mapping):
            check_code(file, value)


def check_names(file: Path, config: Mapping[str, Any], kind: Any) -> None:
    """ValueError for a setting that names code, or that the class does not know and would pass over."""
    check_code(file, config)
    if kind in TEXT_MODELS:  # transformers notes much that is not the network's
        return
    known = inspect.signature(kind.__init__).parameters.keys() | NOTES
    for key, value in config.items():
        if key not in known and value not in (None, False):
            raise ValueError(
                f"{file}: {kind.__name__} has no setting {key!r} (={value!r:.80}): another version's network?"
            )


def check_sizes(file: Path | str, config: Mapping[str, Any], available: int) -> None:
    """ValueError for more layers than any network has, or one that its weights cannot fill; see `check_network`."""
    for key, value in config.items():
        if isinstance(value, list) and len(value) > MOST_LEVELS:
            raise ValueError(f"{file}: {key} has {len(value)} entries; a network has at most {MOST_LEVELS} levels")
        if key.endswith("_token_id"):
            continue
        limit = LARGEST_SIDE if key == "sample_size" else MOST_LAYERS if key in COUNTS else max(available, WIDE)
        if any(not math.isfinite(number) or abs(number) > limit for number in numbers(value)):
            raise ValueError(f"{file}: {key}={value!r:.80} cannot be: expected numbers up to {limit}")
    levels = len(config.get("down_block_types") or (0,))
    per_level = [max([1, *numbers(config.get(key, 1))]) for key in COUNTS]
    if (layers := levels * math.prod(per_level)) > MOST_LAYERS:
        chosen = ", ".join(f"{key}={config[key]!r:.80}" for key in COUNTS if key in config)
        raise ValueError(f"{file}: {chosen} make {layers:.0f} layers; a network has at most {MOST_LAYERS}")


def check_choices(file: Path, config: Mapping[str, Any], choices: Mapping[str, frozenset[Any]], what: str) -> None:
    """ValueError for a setting that is none of those that are supported."""
    for key, supported in choices.items():
        value = config.get(key)
        found = value if isinstance(value, list | tuple) else (value,)
        # a key that is not there has its default, and every default is supported
        if key in config and not all(isinstance(v, str | int | None) and v in supported for v in found):
            expected = ", ".join(sorted({str(choice) for choice in supported}))
            raise ValueError(f"{file}: {what} with {key}={value!r:.80} is not supported; expected {expected}")


def check_channels(file: Path, config: Mapping[str, Any], kind: Any) -> None:
    """ValueError unless the network returns as many channels as it takes, or those of a learned variance besides."""
    default = inspect.signature(kind.__init__).parameters
    taken, returned = (config.get(key, default[key].default) for key in ("in_channels", "out_channels"))
    if returned not in (taken, 2 * taken):
        wrong = f"expected out_channels={taken}, or {2 * taken} with a learned variance"
        if taken > returned:
            wrong = f"more channels than the {returned} of the noisy sample (inpainting, or a condition beside it): not supported"
        raise ValueError(f"{file}: in_channels={taken}, out_channels={returned}: {wrong}")


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a `sample_size`; ValueError if it does not say them."""
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in pair):
        raise ValueError(
            f"sample_size must be a whole number from 1 to {LARGEST_SIDE} or two, height and width, got {size!r:.80}"
        )
    return pair


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's own settings, and nothing else that its file says."""
    own = CLIPTextConfig().to_dict().keys() - {"_name_or_path", "transformers_version", "architectures", "model_type"}
    return {key: value for key, value in config.items() if key in own - {"dtype"}}


def check_network(file: Path, config: Mapping[str, Any], classes: tuple[Any, ...], available: int) -> None:
    """Look at a network's configuration, before its weights are read.

    Args:
        file: the configuration.
        config: its content.
        classes: that the network may be of.
        available: bytes of its weights, none of which takes less than one.

    Raises:
        ValueError: another class, or a setting that is not safe, cannot be, or is not supported; by its key.
    """
    kind = class_of(file, config, classes)
    check_names(file, config, kind)
    check_sizes(file, config, available)
    if kind in UNETS:
        check_choices(file, config, UNET_CHOICES, "a UNet")
        check_channels(file, config, kind)
        try:
            sides(config.get("sample_size"))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    elif kind in AUTOENCODERS:
        check_choices(file, config, STAGE_CHOICES, "a first stage")
    else:
        check_choices(file, config, TEXT_CHOICES, "a text model")
    try:
        with torch.device("meta"):
            network: nn.Module = (
                kind(CLIPTextConfig(**text_settings(config))) if kind in TEXT_MODELS else kind.from_config(dict(config))
            )
    except Exception as error:  # settings that do not go together fail in whatever way they lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{file}: no {kind.__name__} can be built of these settings: {reason}") from error
    needed = sum(parameter.numel() for parameter in network.parameters())
    if needed > max(available, LARGE):
        sizes = {key: max(numbers(value), default=0) for key, value in config.items() if not key.endswith("_token_id")}
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"{file}: its settings describe {needed} weights, their files have {available} bytes; the largest setting is "
            f"{largest}={config[largest]!r:.80}"
        )
