"""The files with one network's weights in a folder of diffusers' or transformers' layout: whole, in shards, of a variant."""

import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tfmq_exp.core.file_kind import kind_of, why_missing
from tfmq_exp.denoisers.loading.checkpoint import read_tensors

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
FORMATS = ("safetensors", "bin")
VARIANTS = ("", "fp32", "fp16", "bf16")  # the order of preference; any others after these
# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors and a variant's shards in both orders of their
# names; their indices, with the variant anywhere.
NAME = re.compile(
    rf"({'|'.join(STEMS)})(?:\.([\w-]+?))?(?:-(\d+)-of-(\d+))?(?:\.([\w-]+?))?\.({'|'.join(FORMATS)})"
    r"((?:\.[\w-]+?)?\.index(?:\.[\w-]+?)?\.json)?"
)
EXPECTED = f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors, whole or in shards, or .bin files by these names"
log = logging.getLogger(__name__)


class WeightSet(NamedTuple):
    """A set of weights that a folder may hold. Smaller ones are preferred: without a variant such as fp16, then safetensors."""

    rank: int
    variant: str
    format: int
    stem: int


def set_of(name: str) -> tuple[WeightSet, int, bool] | None:
    """The set that a file belongs to, the number of its shards (0: it is whole), and whether the file is an index."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    stem, before, _, shards, after, kind, index = match.groups()
    variant = before or after or (index or "").removesuffix(".json").replace(".index", "").strip(".")
    rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    weights = WeightSet(rank, variant, FORMATS.index(kind), STEMS.index(stem))
    return weights, int(shards or 0), index is not None


def shards_of(index: Path) -> list[Path]:
    """The files that an index names; ValueError for another file, or names of anything but files in its folder."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        inside = all(isinstance(name, str) and Path(name).name == name and name.endswith(FORMATS) for name in named)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kind = kind_of(index) or "is damaged"
        raise ValueError(f"{index} {kind}: expected a `weight_map` of names to files") from error
    if not named or not inside:
        raise ValueError(f"{index} is damaged: expected a `weight_map` of names to files in the same folder")
    return [index.with_name(name) for name in sorted(named)]


def weight_files(folder: Path) -> list[Path]:
    """The files of the preferred set of weights in one component's folder, all of which exist.

    Shards are those that their index names, and without one those that their own names count.

    Raises:
        FileNotFoundError: no weights, or not all shards; a link that leads nowhere.
        ValueError: a damaged index; a folder, a pipe or a device in the place of a file, which would be read for ever.
    """
    known = [(found, file) for file in sorted(folder.iterdir()) if (found := set_of(file.name)) is not None]
    if not known:
        names = [file for file in sorted(folder.iterdir()) if not file.name.endswith((".json", ".txt", ".md"))]
        kind = kind_of(names[0]) if names and names[0].is_file() else None
        there = (f"; there is {names[0].name}" if names else "") + (f", which {kind}" if kind else "")
        raise FileNotFoundError(f"no weights in {folder}: expected {EXPECTED}{there}")
    preferred = min(weights for (weights, _, _), _ in known)
    shards = {file: count for (weights, count, is_index), file in known if weights == preferred and not is_index}
    indices = [file for (weights, _, is_index), file in known if weights == preferred and is_index]
    if not (files := [file for file, count in shards.items() if not count]):
        if indices:
            files, source = shards_of(indices[-1]), f"its {indices[-1].name}"
        else:  # name-00001-of-00003 and so on
            first, count = next(iter(shards.items()))
            before, digits, after = re.split(r"-(\d+)(?=-of-)", first.name, maxsplit=1)
            files = [first.with_name(f"{before}-{i:0{len(digits)}}{after}") for i in range(1, count + 1)]
            source = "the other shards' names"
        if missing := [file for file in files if not file.exists()]:
            lacking = f"{missing[0].name}, {len(missing)} of {len(files)} shards that {source} speak of"
            raise FileNotFoundError(f"{folder} lacks {lacking}{why_missing(missing[0])}")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"no weights at {file}{why_missing(file)}")
        if not file.is_file():
            raise ValueError(f"{file} {kind_of(file)}")
    return files


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read all weights in a component's folder, by name; errors are those of `weight_files` and `Checkpoint`."""
    files, state = weight_files(folder), dict[str, Tensor]()
    if (known := set_of(files[0].name)) and known[0].variant:
        log.info("%s has weights of the variant %s alone: %s", folder, known[0].variant, files[0].name)
    for file in files:
        tensors = read_tensors(file)
        if twice := state.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(twice)} is in another shard, too")
        state |= tensors
    return state
