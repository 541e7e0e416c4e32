"""Text encoders and tokenizers of pipelines, from folders of transformers' layout, by the exact names of their classes."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from tfmq_exp.core.file_kind import instead_of_text
from tfmq_exp.core.files import read_json
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.loading.condition_encoders import TOKENIZER_SETTINGS, check_tokenizer
from tfmq_exp.denoisers.loading.network_config import LARGE, WIDE, check_code
from tfmq_exp.denoisers.loading.network_folder import check_numbers, count_weights, reason_of, without_weights
from tfmq_exp.denoisers.loading.weight_files import read_state

TEXT_ENCODERS = (
    *("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel", "BertModel"),
    *("Gemma2Model", "Gemma2ForCausalLM", "LlamaModel", "Qwen3Model", "Qwen3ForCausalLM"),
    "Qwen2_5_VLForConditionalGeneration",
)
# With and without "Fast", which are one class today.
KINDS = ("CLIPTokenizer", "T5Tokenizer", "BertTokenizer", "GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer")
TOKENIZERS = (*KINDS, *(f"{kind}Fast" for kind in KINDS), "PreTrainedTokenizerFast", "TokenizersBackend")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
COMPUTED = "position_ids"  # in files of older versions; 0, 1, ...
# Modules of text encoders that no text goes through, or whose output no pipeline reads.
UNUSED = re.compile(r"(^|\.)(visual|lm_head)(\.|$)")
NOTES = ("transformers_version", "architectures")  # settings that change nothing


@contextmanager
def without_progress() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_class(folder: Path, name: str, allowed: tuple[str, ...]) -> Any:
    """The class of transformers by its name; ValueError for one that is not allowed."""
    if name not in allowed:
        raise ValueError(f"{folder}: {name!r:.80} is not supported; expected one of {', '.join(allowed)}")
    return getattr(transformers, name)


def load_text_encoder(folder: Path, name: str) -> Any:
    """Read a text encoder: float32, in evaluation mode, without gradients, on the CPU; older names of weights are converted.

    Args:
        folder: with config.json and safetensors, whole or in shards.
        name: its class, one of `TEXT_ENCODERS`.

    Raises:
        FileNotFoundError: no config.json, no weights, or not all shards.
        ValueError: another class, settings that are not safe or cannot be, weights that do not fit or are not finite, pickles.
    """
    kind = check_class(folder, name, TEXT_ENCODERS)
    file = folder / "config.json"
    settings = read_json(file)
    check_code(file, settings)
    if (model := settings.get("model_type")) not in (None, kind.config_class.model_type):
        raise ValueError(f"{file}: model_type={model!r:.80} is not that of {name}: {kind.config_class.model_type}")
    available = count_weights(folder)
    try:
        check_numbers(settings, max(available, WIDE))
        config = kind.config_class(**settings)
        with without_weights(max(available, LARGE)), torch.device("meta"):
            kind(config)  # to see whether it can be, before it takes memory
        state = {key: value for key, value in read_state(folder).items() if not key.endswith(COMPUTED)}
        if wrong := [key for key, value in state.items() if not value.is_floating_point()]:
            raise ValueError(f"{wrong[0]} is no floating point number: quantized by others?")
        options = {"state_dict": state, "dtype": torch.float32, "local_files_only": True}
        with without_progress():
            encoder, found = kind.from_pretrained(None, config=config, output_loading_info=True, **options)
        if problems := {what: sorted(map(str, names)) for what, names in found.items() if names}:
            what, names = next(iter(problems.items()))
            raise ValueError(f"the weights do not fit {name}: {len(names)} {what.replace('_', ' ')}, first {names[0]}")
    except Exception as error:  # unfit settings fail in any way
        raise ValueError(f"{folder} cannot be loaded: {reason_of(error)}") from error
    require_finite_weights(encoder, f"{folder}: the weights")
    return encoder.eval().requires_grad_(False)


def encoder_settings(encoder: Any) -> dict[str, Any]:
    """Configuration of a text encoder as plain data."""
    return {
        key: value
        for key, value in json.loads(encoder.config.to_json_string(use_diff=False)).items()
        if key not in NOTES
    }


def empty_text_encoder(name: str, settings: Mapping[str, Any], available: int) -> Any:
    """A text encoder of the settings of `encoder_settings`, with nothing in its parameters, of which there are at most `available`.

    Raises:
        ValueError: another class than `TEXT_ENCODERS`, or settings that are not safe or cannot be.
    """
    file = Path("its settings")
    kind = check_class(file, name, TEXT_ENCODERS)
    check_code(file, settings)
    check_numbers(settings, max(available, WIDE))
    try:
        config = kind.config_class(**settings)
        with without_weights(max(available, LARGE)), torch.device("meta"):
            kind(config)  # first, for it takes no memory, whatever the settings are
        with without_weights(max(available, LARGE)):
            encoder = kind(config).eval()
    except Exception as error:  # unfit settings fail in any way
        raise ValueError(f"no {name} can be built of {file}: {reason_of(error)}") from error
    if (needed := sum(value.numel() for value in encoder.parameters())) > available:
        raise ValueError(f"its settings describe {needed} weights, the file has room for {available}")
    for place, value in list(encoder.named_parameters(remove_duplicate=False)):
        owner, _, leaf = place.rpartition(".")
        setattr(encoder.get_submodule(owner), leaf, nn.Parameter(torch.empty(value.shape), requires_grad=False))
    return encoder


def text_layers(encoder: nn.Module) -> list[str]:
    """Names of the linear layers that a text goes through."""
    layers = [name for name, module in encoder.named_modules() if type(module) is nn.Linear]
    return [name for name in layers if not UNUSED.search(name)]


def text_blocks(encoder: nn.Module) -> dict[str, list[str]]:
    """Names of `text_layers` by their block: a layer of the encoder's stack; those outside of it are blocks of their own."""
    stack = next(
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and not UNUSED.search(name)
    )
    blocks: dict[str, list[str]] = {}
    for name in text_layers(encoder):
        inside = name.startswith(f"{stack}.")
        block = f"{stack}.{name.removeprefix(f'{stack}.').split('.')[0]}" if inside else name
        blocks.setdefault(block, []).append(name)
    return blocks


def load_tokenizer(folder: Path, name: str) -> Any:
    """Read a tokenizer from its folder alone.

    Args:
        folder: with a vocabulary and tokenizer_config.json.
        name: its class, one of `TOKENIZERS`.

    Raises:
        FileNotFoundError: no vocabulary.
        ValueError: another class, settings that name code or other files, or a damaged vocabulary.
    """
    kind = check_class(folder, name, TOKENIZERS)
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise FileNotFoundError(f"no vocabulary in {folder}: expected one of {', '.join(VOCABULARIES)}")
    for file in sorted(folder.glob("*.json")):
        if wrong := instead_of_text(file):
            raise ValueError(f"{file} {wrong}")
    settings = folder / TOKENIZER_SETTINGS[0]
    if settings.is_file():
        check_code(settings, read_json(settings))
    check_tokenizer(settings, (*TOKENIZERS, None))
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files fail in any way
        raise ValueError(f"{folder} holds no {name} that can be read: {reason_of(error)}") from error
