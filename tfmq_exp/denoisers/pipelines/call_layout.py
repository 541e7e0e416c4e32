"""The layout of a network's calls, from two runs of a pipeline that differ in their numbers of images: arithmetic on records.

The runs are of two and of three images with the same two texts or classes. A tensor has rows if its first axis grows with the images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tfmq_exp.denoisers.pipelines.pipeline_calls import LENGTHS, GuidanceLayout, Kind
from tfmq_exp.denoisers.pipelines.recorded_pipeline import RecordedStep, Run

IMAGES = (2, 3)  # of the two runs
TOLERANCE = 1e-4  # relative, of float32 results
DIGITS = 5  # of measured weights


@dataclass(frozen=True)
class CallLayout:
    """The arguments that have rows, and the layout of one step.

    Args:
        rows: names of the conditions that have rows.
        lists: names of the arguments that are lists with an entry for each row.
        parts: of one call's rows: 2 where null and given conditions are halves of one batch.
        guidance: of one step.
    """

    rows: frozenset[str]
    lists: frozenset[str]
    parts: int
    guidance: GuidanceLayout


def equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def flatten(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested dicts, lists and tuples by dotted names; empty ones are leaves."""
    if isinstance(value, Mapping) and value:
        return {key: leaf for inner in value for key, leaf in flatten(value[inner], f"{name}.{inner}").items()}
    if isinstance(value, list | tuple) and value:
        return {key: leaf for i, item in enumerate(value) for key, leaf in flatten(item, f"{name}.{i}").items()}
    return {name: value}


def conditions_of(run: Run, call: Mapping[str, Any], lists: frozenset[str]) -> dict[str, Any]:
    """All arguments of a call but sample and timestep, by dotted names.

    Lists of rows become one tensor, padded with zeros, beside the lengths of the rows; or the one value that all rows have.
    ValueError where they have several.
    """
    found: dict[str, Any] = {}
    for name, value in call.items():
        if name in (run.sample, run.timestep):
            continue
        if name not in lists:
            found |= flatten(value, name)
        elif all(isinstance(entry, Tensor) for entry in value):
            found[name] = pad_sequence(value, batch_first=True)
            found[name + LENGTHS] = torch.tensor([len(entry) for entry in value])
        elif all(equal(entry, value[0]) for entry in value):
            found[name] = value[0]
        else:
            raise ValueError(
                f"the argument {name} of the network has other values for each image, which is not supported"
            )
    return found


def first_step(run: Run, lists: frozenset[str]) -> list[dict[str, Any]]:
    """Conditions of the calls in the first step; ValueError unless those of all steps are the same."""
    first = [conditions_of(run, call, lists) for call in run.steps[0].calls]
    for number, step in enumerate(run.steps[1:], start=2):
        if len(step.calls) != len(first):
            found = f"{len(step.calls)} calls of the network in step {number}, {len(first)} in the first"
            raise ValueError(f"{found}: guidance in some of the steps is not supported")
        for before, call in zip(first, step.calls, strict=True):
            now = conditions_of(run, call, lists)
            if changed := [name for name in before | now if not equal(before.get(name), now.get(name))]:
                raise ValueError(f"the condition {changed[0]} changes with the steps, which is not supported")
    return first


def numbers_of_rows(run: Run) -> list[int]:
    """Rows of the sample in each call of the first step."""
    return [len(call[run.sample]) for call in run.steps[0].calls]


def list_arguments(runs: Sequence[Run]) -> frozenset[str]:
    """Names of the arguments that are lists with as many entries as the sample has rows, whatever the number of images."""
    found: list[set[str]] = []
    for run in runs:
        call, count = run.steps[0].calls[0], numbers_of_rows(run)[0]
        found.append({name for name, value in call.items() if isinstance(value, list) and len(value) == count})
    return frozenset(set.intersection(*found)) - {runs[0].sample}


def names_of_rows(few: Mapping[str, Any], more: Mapping[str, Any], counts: tuple[int, int]) -> frozenset[str]:
    """Names of the tensors whose first axis is the number of rows in both runs; ValueError for others that are not the same."""
    if changed := few.keys() ^ more.keys():
        raise ValueError(
            f"the network's argument {min(changed)} depends on the number of images, which is not supported"
        )
    rows: set[str] = set()
    for name, a in few.items():
        b = more[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (*a.shape[:1], *b.shape[:1]) == counts:
            rows.add(name)
        elif not equal(a, b):
            raise ValueError(f"the network's argument {name} depends on the number of images, and is no row of each")
    return frozenset(rows)


def part_of(values: Mapping[str, Any], names: frozenset[str], part: int, parts: int) -> dict[str, Tensor]:
    """The rows of one of the equal parts of a batch; a mask that masks nothing may be None, and is left out."""
    return {
        name: values[name].chunk(parts)[part] for name in values if name in names and isinstance(values[name], Tensor)
    }


def results_of(step: RecordedStep, parts: int) -> tuple[Tensor, Tensor]:
    """Results of each part [parts, images, numbers], and what the scheduler was given of them, in double precision."""
    assert step.used is not None
    results = torch.stack([part for result in step.results for part in result.chunk(parts)]).double()
    used = step.used[: results.shape[1]].double()  # some pipelines keep both halves
    return results[..., : used.shape[1]], used


def fitted_weights(results: Tensor, used: Tensor) -> Tensor:
    """Weights [parts] with which results [parts, ...] come closest to what was used [...], by least squares."""
    return torch.linalg.lstsq(results.flatten(1).T, used.flatten()[:, None]).solution.flatten()


def weights_of_sum(steps: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, ...] | None:
    """Weights with which results [parts, ...] add up to what was used [...]; None if they do not, in all steps alike."""
    found: set[tuple[float, ...]] = set()
    for results, used in steps:
        weights = fitted_weights(results, used)
        error = (weights @ results.flatten(1) - used.flatten()).abs().max()
        if not error <= TOLERANCE * used.abs().max():
            return None
        found.add(tuple(round(float(weight), DIGITS) for weight in weights))
    return found.pop() if len(found) == 1 else None


def kinds_of(weights: Sequence[float]) -> tuple[Kind, ...]:
    """The kinds of one step's results: guidance moves from the null towards the given one, so their weights differ in sign.

    ValueError for more results than these two.
    """
    if len(weights) == 1:
        return ("given",)
    kinds: tuple[Kind, ...] = tuple("given" if weight > 0 else "null" for weight in weights)
    if sorted(kinds) != ["given", "null"]:
        found = f"{len(weights)} results in each step, with the weights {', '.join(f'{w:.3g}' for w in weights)}"
        raise ValueError(f"{found}: expected one, or one that guidance moves to and one that it moves from")
    return kinds


def find_layout(few: Run, more: Run) -> CallLayout:
    """The layout of the calls, from a run with independent and one with equal results.

    Args:
        few: a run of `IMAGES[0]` images of two different texts or classes, with independent results of all rows.
        more: the same with the second text once more, and equal results of all rows.

    Raises:
        ValueError: calls that differ from step to step, more than two results a step, arguments that cannot be told apart.
    """
    lists = list_arguments([few, more])
    calls, others = first_step(few, lists), first_step(more, lists)
    counts = (numbers_of_rows(few), numbers_of_rows(more))
    parts = counts[0][0] // IMAGES[0]
    for count, images in zip(counts, IMAGES, strict=True):
        if set(count) != {parts * images}:
            raise ValueError(f"{images} images make calls of {count} rows, which is not supported")
    rows = frozenset[str]().union(
        *(names_of_rows(a, b, (counts[0][0], counts[1][0])) for a, b in zip(calls, others, strict=True))
    )
    independent, same = ([results_of(step, parts) for step in run.steps] for run in (few, more))
    scale = weights_of_sum([(results[:1], used) for results, used in same])
    sign = -1 if scale and scale[0] < 0 else 1
    kinds = kinds_of((sign * fitted_weights(*independent[0])).tolist())
    guidance = GuidanceLayout(kinds, len(calls), weights_of_sum(independent), scale[0] if scale else None)
    return CallLayout(rows, lists, parts, guidance)
