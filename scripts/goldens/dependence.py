"""Dependence of every layer, measured: one input is changed, and the bits of its output are compared."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from goldens.architectures import POSITIONS, Architecture, outputs_of
from goldens.comparing import EXACT, DamagedError, Group

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def other_mask(mask: Tensor) -> Tensor:
    """One word fewer in every row, or one more where there is but one."""
    found, last = mask.clone(), (mask != 0).sum(dim=1) - 1
    fewer = last > 0
    found[torch.arange(len(mask)), torch.where(fewer, last, 1)] = (~fewer).to(mask)
    return found


def other_values(value: Tensor) -> Tensor:
    """The same with noise; always the same noise."""
    return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def changes(case: Architecture) -> dict[str, list[dict[str, Any]]]:
    """By kind of input: arguments in which nothing but that is another.

    Kinds with recorded variations (`pooled0`, `pooled1`) take these. Of the other arguments the noisy input is `x`, masks and
    positions of tokens are known by their names, and the words of a text are the hidden states that remain.
    """
    base, found = case.arguments, dict[str, list[dict[str, Any]]]()
    kinds = sorted(case.settings["varied"], key=len, reverse=True)
    for variation in filter(None, case.settings["conditions"]):
        # a digit may belong to the kind: `text_t50` is the first variation of `text_t5`
        kind = next((kind for kind in kinds if re.fullmatch(rf"{re.escape(kind)}\d*", variation)), variation)
        found.setdefault(kind, []).append(case.variation(variation))
    recorded = {name for many in found.values() for one in many for name in one if one[name] is not base[name]}
    time = case.settings["timestep_argument"]
    found["t"] = [case.at(base, t) for t in case.timesteps if t != base[time].flatten()[0]]
    changed: dict[str, dict[str, Any]] = {}
    for name in base.keys() - recorded - {time}:
        if not isinstance(value := base[name], Tensor):
            continue
        if name == case.sample:
            changed.setdefault("x", {})[name] = other_values(value)
        elif "mask" in name:
            changed.setdefault("mask", {})[name] = other_mask(value)
        elif name in POSITIONS:
            changed.setdefault("ids", {})[name] = value + 1.0 + torch.arange(len(value))[:, None].to(value)
        elif "hidden_states" in name:
            changed.setdefault("text", {})[name] = other_values(value)
    return found | {kind: [{**base, **values}] for kind, values in changed.items()}


def same(some: Any, other: Any) -> bool:
    """Whether two outputs of a layer have the same bits."""
    return some.shape == other.shape and torch.equal(some, other)


def measured(case: Architecture) -> dict[str, list[str]]:
    """The kinds of input that every layer depends on which ran, of those that the goldens varied.

    Raises:
        DamagedError: a kind of input that no argument is known for.
    """
    layers = [name for name, module in case.network.named_modules() if isinstance(module, LAYERS)]
    kinds, different = case.settings["varied"], changes(case)
    if unknown := [kind for kind in kinds if kind not in different]:
        raise DamagedError(f"{case.name}: it is not known which argument is {unknown[0]!r}")
    with outputs_of(case.network, layers) as outputs:

        def run(arguments: dict[str, Any]) -> dict[str, Any]:
            outputs.clear()
            case.run(arguments)
            return dict(outputs)

        first = run(case.arguments)
        others = {kind: [run(arguments) for arguments in different[kind]] for kind in kinds}
    return {
        name: [kind for kind in kinds if not all(same(output, other[name]) for other in others[kind])]
        for name, output in first.items()
    }


def dependence(case: Architecture) -> Iterator[Group]:
    """Every layer that ran, and what it depends on; the temporal layers among them that depend on the timestep alone."""
    ours, golden = measured(case), case.settings["dependence"]
    group = Group(f"{case.name}: dependence of every layer", EXACT)
    group.compare(len(ours), len(golden))
    wrong = [name for name in golden if ours.get(name) != sorted(golden[name])]
    group.compare(len(wrong), 0)
    group.note = f"another of {wrong[0]}: {ours.get(wrong[0])}" if wrong else f"{len(golden)} layers"
    yield group
    alone = Group(f"{case.name}: layers of the timestep alone", EXACT)
    sites = set(case.settings["feature_sites"])
    different = {name for name in sites if ours.get(name) == ["t"]} ^ set(case.settings["only_t"])
    alone.compare(len(different), 0)
    alone.note = ", ".join(sorted(different))
    yield alone
