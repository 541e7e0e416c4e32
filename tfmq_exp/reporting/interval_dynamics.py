"""Intervals of activation quantizers over the timesteps, run beside run: do they follow the activations, and do seeds agree?

As figures 1 to 3 of TDQ's supplement (arXiv 2306.02316). What is read is `diagnosis/activation_ranges.csv` of runs with
`goal=diagnose`.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from tfmq_exp.report.diagnosis_figures import short_name

Row = dict[str, Any]
FILE = Path("diagnosis/activation_ranges.csv")
LINES = 6  # activations with a plot of their own


@dataclass(frozen=True)
class Dynamics:
    """One run: for every activation its interval and the standard deviation of its values, call after call.

    Args:
        name: bits and method.
        seed: of the run.
        t: timestep of every call.
        interval: by activation, one number for each call.
        deviation: likewise.
    """

    name: str
    seed: int
    t: np.ndarray
    interval: Mapping[str, np.ndarray]
    deviation: Mapping[str, np.ndarray]

    @property
    def label(self) -> str:
        """For legends and tables."""
        return f"{self.name}, seed {self.seed}"


def read_dynamics(run: Path) -> Dynamics:
    """What a run folder holds.

    Raises:
        FileNotFoundError: no diagnosis there.
    """
    if not (run / FILE).is_file():
        raise FileNotFoundError(f"no {FILE} in {run}: it is written by `python run.py goal=diagnose ...`")
    with (run / FILE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept: dict[str, list[Row]] = {}
    for row in rows:
        kept.setdefault(row["activation"], []).append(row)
    settings = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    seed = next(int(line.split(":")[1]) for line in settings if line.startswith("seed:"))
    name = next(line.split(":", 1)[1].strip() for line in settings if line.startswith("name:"))
    some = next(iter(kept.values()))
    return Dynamics(
        name,
        seed,
        np.array([int(row["t"]) for row in some]),
        {key: np.array([float(row["interval"]) for row in found]) for key, found in kept.items()},
        {key: np.array([float(row["std"]) for row in found]) for key, found in kept.items()},
    )


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN where one of them does not change."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def correlations(runs: Sequence[Dynamics]) -> list[Row]:
    """For every activation of every run: r of its deviation with the timestep, and of its interval with its deviation."""
    return [
        {
            "run": run.name,
            "seed": run.seed,
            "activation": name,
            "deviation_with_t": correlation(run.t, run.deviation[name]),
            "interval_with_deviation": correlation(run.interval[name], run.deviation[name]),
        }
        for run in runs
        for name in run.interval
    ]


def share_beyond(values: Sequence[float], least: float) -> float:
    """The share of correlations whose magnitude is larger; those that are not defined count as 0."""
    return float(np.mean([abs(value) > least for value in values]))


def spread(runs: Sequence[Dynamics]) -> list[Row]:
    """Over the seeds of one method: mean and standard deviation of every interval at every call; single seeds are left out.

    Raises:
        ValueError: seeds of one method that were sampled at different timesteps.
    """
    groups: dict[str, list[Dynamics]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return [row for name, group in groups.items() if len(group) > 1 for row in _spread(name, group)]


def _spread(name: str, group: Sequence[Dynamics]) -> Iterator[Row]:
    if any(not np.array_equal(run.t, group[0].t) for run in group):
        raise ValueError(f"the runs of {name} were sampled at different timesteps")
    for activation in group[0].interval:
        found = np.stack([run.interval[activation] for run in group])
        for t, mean, deviation in zip(group[0].t, found.mean(0), found.std(0, ddof=1), strict=True):
            yield {
                "run": name,
                "activation": activation,
                "t": int(t),
                "mean": float(mean),
                "std": float(deviation),
                "relative_std": float(deviation / mean),
            }


def rows_of(runs: Sequence[Dynamics]) -> list[Row]:
    """All of it as a table."""
    return [
        {
            "run": run.name,
            "seed": run.seed,
            "activation": name,
            "t": int(t),
            "interval": float(interval),
            "deviation": float(deviation),
        }
        for run in runs
        for name in run.interval
        for t, interval, deviation in zip(run.t, run.interval[name], run.deviation[name], strict=True)
    ]


def liveliest(runs: Sequence[Dynamics], count: int = LINES) -> list[str]:
    """Activations whose interval changes most over the timesteps in some run, against its mean."""
    change = {
        name: max(float(run.interval[name].std() / run.interval[name].mean()) for run in runs)
        for name in runs[0].interval
    }
    return sorted(change, key=lambda name: -change[name])[:count]


def draw(runs: Sequence[Dynamics], path: Path) -> None:
    """Some activations: intervals of every run, and the deviation of the first run's values, over the timesteps.

    Seeds of one method share its colour. Both axes begin at zero, so that what hardly changes looks like it.
    """
    names, methods = liveliest(runs), list(dict.fromkeys(run.name for run in runs))
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 2.2 * len(names)), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[:, 0], strict=True):
        for run in runs:
            axis.plot(run.t, run.interval[name], color=f"C{methods.index(run.name)}")
        beside = axis.twinx()
        beside.plot(runs[0].t, runs[0].deviation[name], color="0.6", linestyle="--")
        beside.set_ylabel("deviation")
        axis.set_title(short_name(name), fontsize=9)
        axis.set_ylabel("interval")
        for values in (axis, beside):
            values.set_ylim(0, 1.1 * values.dataLim.y1)
        axis.invert_xaxis()
    colours = [Line2D([], [], color=f"C{index}") for index in range(len(methods))]
    seeds = {method: ", ".join(str(run.seed) for run in runs if run.name == method) for method in methods}
    figure.legend(
        [*colours, Line2D([], [], color="0.6", linestyle="--")],
        [*(f"{method}, seed {seeds[method]}" for method in methods), f"deviation of values, {runs[0].label}"],
        loc="outside upper center",
        ncols=2,
        fontsize=8,
    )
    axes[-1, 0].set_xlabel("timestep t (sampling goes to the right)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary(runs: Sequence[Dynamics]) -> list[Row]:
    """For every run: how many activations change with the timestep, and how many intervals follow."""
    found: list[Row] = []
    for run in runs:
        rows = correlations([run])
        with_t, following = ([row[key] for row in rows] for key in ("deviation_with_t", "interval_with_deviation"))
        line = {f"|r| > {least}": share_beyond(with_t, least) for least in (0.5, 0.7)}
        found.append(
            {"run": run.label, **line, "intervals follow, r > 0.5": float(np.mean([r > 0.5 for r in following]))}
        )
    return found
