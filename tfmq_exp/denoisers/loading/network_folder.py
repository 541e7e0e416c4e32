"""A network of diffusers from a component's folder: its settings checked, built without weights, then filled strictly.

Only safetensors are read. Nothing in a folder names code: classes are chosen from the names that a caller allows.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from tfmq_exp.core.file_kind import is_safetensors, kind_of
from tfmq_exp.core.files import read_json
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.loading.checkpoint import assign_weights
from tfmq_exp.denoisers.loading.network_config import LARGE, WIDE, check_code, check_known
from tfmq_exp.denoisers.loading.single_file import read_single_file
from tfmq_exp.denoisers.loading.weight_files import read_state, weight_files
from tfmq_exp.denoisers.pipelines.pipeline_classes import DENOISERS

ADAPTER = "adapter_config.json"  # weights that other programs would put on top of the folder's
MOST_MODULES = 10_000  # of one network; the largest published ones have some thousands
MOST_TABLE = 2**29  # numbers in buffers: tables of positions and frequencies
# Names of autoencoders' attention layers in older versions of diffusers -> today's.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def reason_of(error: Exception) -> str:
    """The message of an error of a library in one line."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def safetensors_files(folder: Path) -> list[Path]:
    """The files of `weight_files`; ValueError for a pickle, or an adapter beside them."""
    if (folder / ADAPTER).exists():
        raise ValueError(f"{folder / ADAPTER}: adapters are not supported: merge it into the weights")
    files = weight_files(folder)
    for file in files:
        if file.suffix != ".safetensors" or not is_safetensors(file):
            kind = kind_of(file) or "is a pickle, which is a program"
            raise ValueError(f"{file} {kind}; expected safetensors: save the pipeline with safe_serialization=True")
    return files


def count_weights(folder: Path, checkpoint: Path | None = None) -> int:
    """The most weights that a folder's files have room for, or a checkpoint in their place, one byte each."""
    return sum(file.stat().st_size for file in ([checkpoint] if checkpoint else safetensors_files(folder)))


def check_numbers(settings: Mapping[str, Any], most: int) -> None:
    """ValueError, by its key, for a number that no network of this size has: tables of it would not fit into memory."""
    for key, value in settings.items():
        if wrong := [leaf for leaf in tree_leaves(value) if isinstance(leaf, int | float) and not abs(leaf) <= most]:
            raise ValueError(f"{key}={wrong[0]!r:.40} cannot be: expected numbers up to {most}")


@contextmanager
def without_weights(most: int) -> Iterator[None]:
    """Build networks whose parameters are on the meta device, and whose buffers and tables are real.

    Settings come from files: more than `most` weights, `MOST_MODULES` layers or `MOST_TABLE` numbers in buffers end the
    construction, before they take time or memory.

    Raises:
        ValueError: a network that is larger.
    """
    limits, counts = {"weights": most, "layers": MOST_MODULES, "numbers in tables": MOST_TABLE}, dict[str, int]()

    def count(what: str, number: int) -> None:
        counts[what] = counts.get(what, 0) + number
        if counts[what] > limits[what]:
            raise ValueError(f"its settings describe more than {limits[what]} {what}, which its files cannot fill")

    def parameter(_module: nn.Module, _name: str, value: nn.Parameter | None) -> Any:
        if value is None:
            return None
        count("weights", value.numel())
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)

    def buffer(_module: nn.Module, _name: str, value: Tensor | None) -> None:
        count("numbers in tables", 0 if value is None else value.numel())

    def layer(_module: nn.Module, _name: str, _value: nn.Module | None) -> None:
        count("layers", 1)

    with (
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_buffer_registration_hook(buffer),
        hooks.register_module_module_registration_hook(layer),
    ):
        yield


def read_config(folder: Path, classes: Collection[str], checkpoint: Path | None = None) -> tuple[Any, dict[str, Any]]:
    """The class of the network in a folder of diffusers' layout, and its settings.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a class that is not among `classes`, or a setting that names code or that the class does not know.
    """
    file = folder / "config.json"
    config = read_json(file)
    check_code(file, config)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"{folder} holds a network of class {name!r:.80}; expected {' or '.join(sorted(classes))}")
    kind = getattr(diffusers, name)
    try:
        check_known(kind, config)
        check_numbers(config, max(count_weights(folder, checkpoint), WIDE))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return kind, config


def build_outline(folder: Path, classes: Collection[str], checkpoint: Path | None = None) -> Any:
    """Build the network of a folder without its weights: parameters are on the meta device, tables are real.

    Errors are those of `load_network`.
    """
    kind, config = read_config(folder, classes, checkpoint)
    most = max(count_weights(folder, checkpoint), LARGE)
    try:
        with without_weights(most), torch.device("meta"):
            kind.from_config(dict(config))  # first, for it takes no memory, whatever the settings are
        with without_weights(most):
            return kind.from_config(dict(config)).eval()
    except Exception as error:  # settings that do not go together fail in any way
        reason = reason_of(error)
        raise ValueError(f"{folder / 'config.json'}: no {kind.__name__} can be built of it: {reason}") from error


def present_names(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Weights by today's names of layers, where a file has those of older versions of diffusers."""
    found = dict(state)
    for key in [key for key in state if key not in expected]:
        *outer, layer, leaf = ["", *key.split(".")]
        if (present := ".".join([*outer, FORMER_NAMES.get(layer, layer), leaf])[1:]) in expected:
            found[present] = found.pop(key)
    return found


def load_network(folder: Path, classes: Collection[str] = DENOISERS, checkpoint: Path | None = None) -> Any:
    """Read a network of diffusers: float32, in evaluation mode, without gradients, on the CPU.

    Parameters are the files' alone, by their names, all of them. Tables that are in no file (positions, rotary frequencies) are
    computed by the class.

    Args:
        folder: with config.json and safetensors, whole or in shards.
        classes: names of the classes of diffusers that it may be; all denoisers of the known pipelines by default.
        checkpoint: weights in place of the folder's, see `read_single_file`.

    Raises:
        FileNotFoundError: no config.json, no weights, or not all shards.
        ValueError: another class, settings that are not safe or cannot be, weights that do not fit or are not finite, pickles.
    """
    network = build_outline(folder, classes, checkpoint)
    state = read_single_file(checkpoint, network) if checkpoint else read_state(folder)
    try:
        assign_weights(network, present_names(state, network.state_dict().keys()))
    except ValueError as error:
        raise ValueError(f"{checkpoint or folder} cannot be loaded: {reason_of(error)}") from error
    require_finite_weights(network, f"{checkpoint or folder}: the weights")
    return network
