"""Overrides of the command line that Hydra cannot read, or whose keys, groups or choices do not exist: what to type instead."""

import difflib
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SIMILAR_SIBLING = 0.5  # the same of keys in the place that was named
SIMILAR = 0.75  # of two last words, 1 for the same
SUGGESTIONS = 5


def read_arguments(words: Sequence[str]) -> Namespace:
    """The command line as Hydra's own parser takes it apart.

    Raises:
        SystemExit: with status 2, for words that it does not know, with where they go.
    """
    parser = get_args_parser()
    arguments, left = parser.parse_known_args(list(words))
    if left:
        order = "flags such as -m come before all overrides or after them, not between"
        dashes = "overrides are KEY=VALUE, without dashes"
        hint = dashes if left[0].startswith("-") else order
        parser.error(f"unrecognized arguments: {' '.join(left)}; {hint}")
    return arguments


def unreadable(arguments: Namespace, conf: Path) -> list[str]:
    """A line for each override that Hydra cannot read, or whose `~` nothing would expand: how it can be written.

    A group of `conf` set to null is one: Hydra takes it in files alone.
    """
    texts = arguments.overrides
    lines = [line for text in texts if (line := misread(text, sweeping=arguments.multirun))]
    nothing = [key for key, _, value in (text.partition("=") for text in texts) if "null" in value.split(",")]
    groups = [key for key in nothing if "." not in key and (conf / key).is_dir()]
    return [
        *lines,
        *(
            f"{key}=null: a config group cannot be null on the command line: leave {key} out, or name one of its files"
            for key in groups
        ),
    ]


def misread(text: str, *, sweeping: bool) -> str:
    """Describe the error in an override, as the shell has passed it; empty if there is none. Commas may separate a sweep's values."""
    key, equals, value = text.partition("=")
    try:
        parsed_value = parsed(text).value()
    except HydraException as error:
        reason = str(error).splitlines()[0]
        if not equals:
            return f"{text} is no override: those are KEY=VALUE or GROUP=CHOICE"
        if value[:1] in ("[", "{") or value.endswith(")"):
            return f"{text}: {reason}; inside it, text with signs such as = or a space needs quotes"
        parts = value.split(",") if sweeping else [value]
        right = f"{key}={','.join(quoted(os.path.expanduser(part)) for part in parts)}"
        try:
            parsed(right)
        except HydraException:
            return f"{text}: {reason}"
        return f"{text} has signs that need quotes inside those of the shell: {shlex.quote(right)}"
    if isinstance(parsed_value, str) and (expanded := os.path.expanduser(parsed_value)) != parsed_value:
        return f"{text}: ~ is not expanded here; write {shlex.quote(f'{key}={quoted(expanded)}')}"
    return ""


def parsed(text: str) -> Override:
    """One override as Hydra reads it; HydraException where it cannot."""
    return OverridesParser.create().parse_override(text)


def quoted(value: str) -> str:
    """Text in quotes, as Hydra reads it whatever is in it."""
    mark = "'" if '"' in value and "'" not in value else '"'
    inside = re.sub(rf"(\\*)({mark}|\Z)", lambda found: 2 * found[1] + (f"\\{mark}" if found[2] else ""), value)
    return f"{mark}{inside}{mark}"


def unknown_keys(arguments: Namespace, conf: Path) -> list[str]:
    """A line for each override whose key, group or choice does not exist in the folder `conf`, with similar ones that do."""
    folders = [conf, *([Path(arguments.config_dir).absolute()] if arguments.config_dir else [])]
    overrides = [override for text in arguments.overrides if (override := parsed(text)).package is None]
    groups = {f"{path.relative_to(folder)}" for folder in folders for path in folder.glob("**/*/")}
    chosen = [o for o in overrides if o.key_or_group in groups]
    if lines := [line for o in chosen for line in unknown_choices(o, folders)]:
        return lines
    given = [o.key_or_group for o in overrides if o not in chosen and not o.is_add() and not o.is_hydra_override()]
    words = [f"{o.key_or_group}={choices(o)[0]}" for o in chosen if choices(o)]
    path = ",".join(quoted(f"file://{folder}") for folder in folders[1:])
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            keys = set(keys_of(compose("config", [f"hydra.searchpath=[{path}]", *words])))
    except (HydraException, OmegaConfBaseException):  # Hydra has said why
        return []
    for key in (key for key in given if key not in keys):
        group, _, name = key.partition(".")
        files = [path for folder in folders for path in sorted((folder / group).glob("*.yaml"))]
        if elsewhere := [f"{group}={path.stem}" for path in files if name in set(keys_of(OmegaConf.load(path)))]:
            own = ", ".join(sorted(name for name in keys if name.startswith(f"{group}.") and not name.endswith("_")))
            where = f"there is one in {', '.join(elsewhere)}" + (f"; here are {own}" if own else "")
            lines.append(f"there is no key {key} in what is chosen; {where}")
        elif near := similar(key, groups if "/" in key else keys):
            lines.append(f"there is no key {key}: did you mean {' or '.join(near)}?")
    return lines


def choices(override: Override) -> list[str]:
    """Files that an override of a group names; several in a sweep."""
    if override.is_sweep_override():
        return [text for text in override.sweep_string_iterator() if isinstance(text, str)]
    return [value] if isinstance(value := override.value(), str) else []


def unknown_choices(override: Override, folders: Sequence[Path]) -> Iterator[str]:
    """A line for each choice that no file of the group has the name of."""
    group = override.key_or_group
    for choice in choices(override):
        files = {at / group: (at / group).glob("*/*.yaml" if "/" in choice else "*.yaml") for at in folders}
        known = {path.relative_to(at).with_suffix("").as_posix() for at, paths in files.items() for path in paths}
        if choice.removesuffix(".yaml") not in {*known, "null"} and (near := similar(choice, known)):
            yield f"there is no {group}={choice}: did you mean {' or '.join(f'{group}={name}' for name in near)}?"


def keys_of(node: Any, above: str = "") -> Iterator[str]:
    """Every key below a node, with those of its inner nodes."""
    for name in node if isinstance(node, DictConfig) else ():
        yield (key := f"{above}{name}")
        if not OmegaConf.is_interpolation(node, str(name)) and not OmegaConf.is_missing(node, str(name)):
            yield from keys_of(node[name], f"{key}.")


def similar(name: str, known: Collection[str]) -> list[str]:
    """Known names with the last word of the name, else with a similar word in the same place, else anywhere; the most similar first."""

    def place_and_word(name: str) -> tuple[str, str]:
        *_, word = re.split("[./]", name)
        return name.removesuffix(word), word

    place, word = place_and_word(name)
    last = {one: difflib.SequenceMatcher(None, place_and_word(one)[1], word).ratio() for one in known}
    beside = [one for one in known if place and place_and_word(one)[0] == place and last[one] >= SIMILAR_SIBLING]
    found = [one for one in known if last[one] == 1] or beside or [one for one in known if last[one] >= SIMILAR]
    order = {one: (-last[one], -difflib.SequenceMatcher(None, name, one).ratio(), one) for one in found}
    return sorted(found, key=order.__getitem__)[:SUGGESTIONS]
