"""What a person typed after `run.py`, where Hydra cannot read it or knows no such key: what to type instead."""

import difflib
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

NEAR = 0.75  # likeness of two keys' last words, 1 for the same
SUGGESTIONS = 5


def read_arguments(words: Sequence[str]) -> Namespace:
    """The command line as Hydra's own parser takes it apart."""
    return get_args_parser().parse_args(list(words))


def unreadable(arguments: Namespace) -> list[str]:
    """A line for each override that Hydra cannot read, or whose `~` nobody would expand: how it can be written.

    Args:
        arguments: of `read_arguments`.
    """
    return [line for text in arguments.overrides if (line := misread(text, sweeping=arguments.multirun))]


def misread(text: str, *, sweeping: bool) -> str:
    """What is wrong with one override; empty if nothing is.

    Args:
        text: as the shell has passed it.
        sweeping: commas part values of a sweep.
    """
    try:
        override = parsed(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        if not equals:
            return f"{text} is no override: those are KEY=VALUE or GROUP=CHOICE"
        if value[:1] in ("[", "{") or value.endswith(")"):
            return f"{text}: {str(error).splitlines()[0]}; inside it, text with signs such as = or a space needs quotes"
        parts = value.split(",") if sweeping else [value]
        right = f"{key}={','.join(quoted(os.path.expanduser(part)) for part in parts)}"
        try:
            parsed(right)
        except HydraException:
            return f"{text}: {str(error).splitlines()[0]}"
        return f"{text} has signs that need quotes inside those of the shell: {shlex.quote(right)}"
    value = override.value()
    if isinstance(value, str) and os.path.expanduser(value) != value:
        right = f"{text.partition('=')[0]}={quoted(os.path.expanduser(value))}"
        return f"{text}: ~ is not expanded here; write {shlex.quote(right)}"
    return ""


def parsed(text: str) -> Override:
    """One override as Hydra reads it.

    Raises:
        HydraException: it cannot.
    """
    return OverridesParser.create().parse_override(text)


def quoted(value: str) -> str:
    """Text as Hydra reads it whatever is in it."""
    mark = "'" if '"' in value and "'" not in value else '"'
    inside = re.sub(rf"(\\*)({mark}|\Z)", lambda found: 2 * found[1] + (f"\\{mark}" if found[2] else ""), value)
    return f"{mark}{inside}{mark}"


def unknown_keys(arguments: Namespace, conf: Path) -> list[str]:
    """A line for each override of a key that is not there, with keys that are and end alike.

    Args:
        arguments: of `read_arguments`.
        conf: the folder of the configuration.
    """
    overrides = [override for text in arguments.overrides if (override := parsed(text)).package is None]
    groups = sorted(f"{path.relative_to(place)}" for place in places(conf, arguments) for path in place.glob("**/*/"))
    chosen = [o for o in overrides if o.key_or_group in groups]
    given = [o.key_or_group for o in overrides if o not in chosen and not o.is_add() and not o.is_hydra_override()]
    try:
        cfg = composed(conf, arguments, [first_choice(o) for o in chosen])
    except (HydraException, OmegaConfBaseException):  # what Hydra has said of groups stands by itself
        return []
    keys = sorted(keys_of(cfg))
    lines = []
    for key in (key for key in given if key not in keys):
        if choices := [choice for place in places(conf, arguments) for choice in having(key, place)]:
            lines.append(f"there is no key {key} in what is chosen; there is one in {', '.join(choices)}")
        elif near := alike(key, groups if "/" in key else keys):
            lines.append(f"there is no key {key}: did you mean {' or '.join(near)}?")
    return lines


def having(key: str, conf: Path) -> list[str]:
    """Choices of the group that a key begins with whose files have the key."""
    group, _, name = key.partition(".")
    return [
        f"{group}={path.stem}"
        for path in sorted((conf / group).glob("*.yaml"))
        if name in set(keys_of(OmegaConf.load(path)))
    ]


def places(conf: Path, arguments: Namespace) -> list[Path]:
    """The folders that groups are in."""
    return [conf, *([Path(arguments.config_dir).absolute()] if arguments.config_dir else [])]


def first_choice(override: Override) -> str:
    """A choice of a group, the first of several."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def composed(conf: Path, arguments: Namespace, choices: Sequence[str]) -> DictConfig:
    """The configuration with other choices of groups alone."""
    others = ",".join(quoted(f"file://{place}") for place in places(conf, arguments)[1:])
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", [f"hydra.searchpath=[{others}]", *choices])


def keys_of(node: Any, above: str = "") -> Iterator[str]:
    """Every key below a node, with those of its inner nodes."""
    if not isinstance(node, DictConfig):
        return
    for name in node:
        key = f"{above}{name}"
        yield key
        if not OmegaConf.is_interpolation(node, str(name)) and not OmegaConf.is_missing(node, str(name)):
            yield from keys_of(node[name], f"{key}.")


def alike(key: str, known: Iterable[str]) -> list[str]:
    """Those of the known keys whose last word is that of the key or nearly, the most alike first."""

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def last_word(name: str) -> str:
        return re.split("[./]", name)[-1]

    near = {other: likeness(last_word(key), last_word(other)) for other in known}
    best = 1.0 if 1.0 in near.values() else NEAR
    return sorted((k for k, v in near.items() if v >= best), key=lambda k: (-near[k], -likeness(key, k)))[:SUGGESTIONS]
