"""Scales of activation quantizers over the timesteps: do they follow the activations, and do seeds agree?

As figures 1 to 3 of TDQ's supplement (arXiv 2306.02316), where a scale is called interval. Read from
`diagnosis/activation_ranges.csv` of runs with `until=diagnose`.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib.lines import Line2D

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.figures import PLOTTED_ACTIVATIONS, TIME, saved_figure, short_name

Row = dict[str, Any]
FILE = Path("diagnosis/activation_ranges.csv")


class RunScales(NamedTuple):
    """One run: for every activation its scale and the standard deviation of its values, call after call."""

    name: str  # bits and method
    seed: int
    t: np.ndarray  # timestep of every call
    interval: Mapping[str, np.ndarray]  # the scale at every call, by activation
    deviation: Mapping[str, np.ndarray]

    @property
    def label(self) -> str:
        """Name of the run in legends and tables."""
        return f"{self.name}, seed {self.seed}"


def read_scales(run: Path) -> RunScales:
    """Read a run folder.

    Raises:
        FileNotFoundError: no diagnosis there.
    """
    if not (run / FILE).is_file():
        raise FileNotFoundError(f"no {FILE} in {run}: it is written by `python run.py until=diagnose ...`")
    with (run / FILE).open(newline="", encoding="utf-8") as file:
        activations = group_by(csv.DictReader(file), lambda row: row["activation"])
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    t = np.array([int(row["t"]) for row in next(iter(activations.values()))])
    interval, deviation = (
        {name: np.array([float(row[column]) for row in rows]) for name, rows in activations.items()}
        for column in ("interval", "std")
    )
    return RunScales(config["name"], config["seed"], t, interval, deviation)


def scale_rows(runs: Sequence[RunScales]) -> list[Row]:
    """Scale and deviation of every activation at every timestep of every run."""
    rows: list[Row] = []
    for run in runs:
        for name, intervals in run.interval.items():
            key = {"run": run.name, "seed": run.seed, "activation": name}
            for t, interval, deviation in zip(run.t, intervals, run.deviation[name], strict=True):
                rows.append(key | {"t": int(t), "interval": float(interval), "deviation": float(deviation)})
    return rows


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN where one of them does not change."""
    return float("nan") if np.ptp(x) == 0 or np.ptp(y) == 0 else float(np.corrcoef(x, y)[0, 1])


def correlations(runs: Sequence[RunScales]) -> list[Row]:
    """Pearson's r of each activation's deviation with the timestep, and of its scale with its deviation, for every run."""
    return [
        {
            **{"run": run.name, "seed": run.seed, "activation": name},
            "deviation_with_t": correlation(run.t, run.deviation[name]),
            "interval_with_deviation": correlation(interval, run.deviation[name]),
        }
        for run in runs
        for name, interval in run.interval.items()
    ]


def summary(runs: Sequence[RunScales]) -> list[Row]:
    """Share of activations that change with the timestep, and of scales that follow; undefined ones count as 0."""
    found: list[Row] = []
    for run in runs:
        rows = correlations([run])
        with_t, following = (np.array([row[k] for row in rows]) for k in [*rows[0]][3:])
        shares = {f"|r| > {least}": np.abs(with_t) > least for least in (0.5, 0.7)}
        shares["intervals follow, r > 0.5"] = following > 0.5
        found.append({"run": run.label} | {name: float(np.mean(share)) for name, share in shares.items()})
    return found


def spread(runs: Sequence[RunScales]) -> list[Row]:
    """Mean and standard deviation of every scale at every call over the seeds of one method; single seeds are left out.

    Raises:
        ValueError: seeds of one method that were sampled at different timesteps.
    """
    rows: list[Row] = []
    for name, group in group_by(runs, lambda run: run.name).items():
        if any(not np.array_equal(run.t, group[0].t) for run in group):
            raise ValueError(f"the runs of {name} were sampled at different timesteps")
        for activation in group[0].interval if len(group) > 1 else ():
            found = np.stack([run.interval[activation] for run in group])
            for t, mean, std in zip(group[0].t, found.mean(0), found.std(0, ddof=1), strict=True):
                numbers = {"mean": float(mean), "std": float(std), "relative_std": float(std / mean)}
                rows.append({"run": name, "activation": activation, "t": int(t), **numbers})
    return rows


def most_changing(runs: Sequence[RunScales], count: int = PLOTTED_ACTIVATIONS) -> list[str]:
    """Activations whose scale changes most over the timesteps in some run, relative to its mean."""

    def change(name: str) -> float:
        return max(float(run.interval[name].std() / run.interval[name].mean()) for run in runs)

    return sorted(runs[0].interval, key=change, reverse=True)[:count]


def draw(runs: Sequence[RunScales], path: Path) -> None:
    """Draw some scales in every run, seeds of a method in one colour, and a run's deviation; axes begin at zero."""
    names = most_changing(runs)
    methods = group_by(runs, lambda run: run.name)
    colours = {name: f"C{index}" for index, name in enumerate(methods)}
    grey: Row = {"color": "0.6", "linestyle": "--"}
    with saved_figure(path, "", (8, 2.2 * len(names)), (len(names), 1)) as (figure, axes):
        for name, left in zip(names, axes, strict=True):
            right = left.twinx()
            for run in runs:
                left.plot(run.t, run.interval[name], color=colours[run.name])
            right.plot(runs[0].t, runs[0].deviation[name], **grey)
            left.set_title(short_name(name), fontsize=9)
            for axis, label in ((left, "interval"), (right, "deviation")):
                axis.set_ylabel(label)
                axis.set_ylim(0, 1.1 * axis.dataLim.y1)
            left.invert_xaxis()
        axes[-1].set_xlabel(TIME)
        lines = [*(Line2D([], [], color=colour) for colour in colours.values()), Line2D([], [], **grey)]
        labels = [f"{name}, seed {', '.join(str(run.seed) for run in group)}" for name, group in methods.items()]
        labels.append(f"deviation of values, {runs[0].label}")
        figure.legend(lines, labels, loc="outside upper center", ncols=2, fontsize=8)
