"""The files with one network's weights in a folder of diffusers' or transformers' layout: whole, in shards, of a variant."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tfmq_exp.core.file_kind import kind_of, why_missing
from tfmq_exp.denoisers.loading.checkpoint import read_tensors

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
FORMS = ("safetensors", "bin")
VARIANTS = ("", "fp32", "fp16", "bf16")  # the order of preference; any others after these
# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors and a variant's shards in both orders of their
# names; their indices, with the variant anywhere.
NAME = re.compile(
    rf"({'|'.join(STEMS)})(?:\.([\w-]+?))?(?:-(\d+)-of-(\d+))?(?:\.([\w-]+?))?\.({'|'.join(FORMS)})"
    r"((?:\.[\w-]+?)?\.index(?:\.[\w-]+?)?\.json)?"
)
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """What tells one network's sets of weights in a folder apart."""

    variant: str
    form: str
    stem: str

    def order(self) -> tuple[int, str, int, int]:
        """What is read rather than others comes first: all the numbers' digits, then safetensors."""
        rank = VARIANTS.index(self.variant) if self.variant in VARIANTS else len(VARIANTS)
        return rank, self.variant, FORMS.index(self.form), STEMS.index(self.stem)


def place_of(name: str) -> tuple[Place, int, bool] | None:
    """The set that a file belongs to, of how many shards it is one (0: it is whole), and whether it is an index."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    stem, before, _, shards, after, form, index = match.groups()
    within = "" if index is None else index.removesuffix(".json").replace(".index", "").strip(".")
    return Place(before or after or within, form, stem), int(shards or 0), index is not None


def shards_of(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        ValueError: no such index, or names of anything but files beside it.
    """
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        inside = all(isinstance(name, str) and Path(name).name == name and name.endswith(FORMS) for name in named)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} {kind_of(index) or 'is damaged'}: expected a `weight_map` of names to files"
        ) from error
    if not named or not inside:
        raise ValueError(f"{index} is damaged: expected a `weight_map` of names to files in the same folder")
    return [index.with_name(name) for name in sorted(named)]


def weight_files(folder: Path) -> list[Path]:
    """The files that are read from one component's folder, all of which are there.

    Raises:
        FileNotFoundError: no weights, or not all shards; a link that leads nowhere.
        ValueError: an index that is none; a folder, a pipe or a device in the place of a file, which would be read for ever.
    """
    files = chosen_files(folder)
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"no weights at {file}{why_missing(file)}")
        if not file.is_file():
            raise ValueError(f"{file} {kind_of(file)}")
    return files


def chosen_files(folder: Path) -> list[Path]:
    """The files with weights that one component's folder says it has.

    Weights without a variant before those of one, such as fp16, which are read where there are no others; safetensors before
    pickles. Shards are those that their index names, and where there is none those that their own names count.

    Raises:
        FileNotFoundError: no weights, or not all shards.
        ValueError: an index that is none.
    """
    found: dict[Place, dict[Path, int]] = {}
    indices: dict[Place, Path] = {}
    for file in sorted(folder.iterdir()):
        if (known := place_of(file.name)) is not None:
            place, shards, is_index = known
            if is_index:
                indices[place] = file
            else:
                found.setdefault(place, {})[file] = shards
    if not found and not indices:
        raise FileNotFoundError(f"no weights in {folder}: expected {expected()}{others(folder)}")
    place = min({*found, *indices}, key=Place.order)
    whole = [file for file, shards in found.get(place, {}).items() if not shards]
    if whole:
        return whole
    if place in indices:
        files, source = shards_of(indices[place]), f"its {indices[place].name}"
    else:
        files, source = counted(found[place]), "the other shards' names"
    if missing := [file for file in files if not file.exists()]:
        count = f"{len(missing)} of {len(files)} shards that {source} speak of"
        raise FileNotFoundError(f"{folder} lacks {missing[0].name}, {count}{why_missing(missing[0])}")
    return files


def counted(shards: Mapping[Path, int]) -> list[Path]:
    """Every shard of a set, from the names of some: `name-00001-of-00003` and so on."""
    first, count = next(iter(shards.items()))

    def numbered(i: int) -> Path:
        return first.with_name(re.sub(r"-(\d+)-of-", lambda m: f"-{i:0{len(m[1])}}-of-", first.name))

    return [numbered(i) for i in range(1, count + 1)]


def expected() -> str:
    """Names of weights that are read."""
    return f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors, whole or in shards, or .bin files by these names"


def others(folder: Path) -> str:
    """What lies there instead."""
    names = sorted(file.name for file in folder.iterdir() if not file.name.endswith((".json", ".txt", ".md")))
    if not names:
        return ""
    kind = kind_of(folder / names[0])
    return f"; there is {names[0]}" + (f", which {kind}" if kind and (folder / names[0]).is_file() else "")


def read_state(folder: Path) -> dict[str, Tensor]:
    """All weights in a component's folder, by name, from `weight_files`.

    Raises:
        FileNotFoundError: as `weight_files`.
        ValueError: as `read_tensors`, or a weight that is in two files.
    """
    files = weight_files(folder)
    known = place_of(files[0].name)
    if known is not None and known[0].variant:
        log.info("%s has weights of the variant %s alone: %s", folder, known[0].variant, files[0].name)
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = read_tensors(file)
        if twice := state.keys() & tensors.keys():
            raise ValueError(f"{file}: {min(twice)} is in another shard, too")
        state |= tensors
    return state
