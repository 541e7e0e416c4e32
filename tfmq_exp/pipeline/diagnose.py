"""Diagnoses of a finished model: pulled through the store one by one, written as tables and figures, the worst printed."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.log_outputs import write_csv
from tfmq_exp.cli.terminal import say
from tfmq_exp.core.files import intact, write_checked, write_json
from tfmq_exp.diagnostics.accumulation import ERRORS, error_accumulation
from tfmq_exp.diagnostics.features import features_by_layer
from tfmq_exp.diagnostics.partial_quantization import QuantizedPart, quantized_parts
from tfmq_exp.diagnostics.ranges import activation_ranges, range_changes
from tfmq_exp.diagnostics.rounding import rounding_changes
from tfmq_exp.diagnostics.sensitivity import THIRDS, PredictionProbe, spread_over_steps, unit_error
from tfmq_exp.diagnostics.temporal_error import feature_errors
from tfmq_exp.pipeline.progress import Advance
from tfmq_exp.pipeline.stages import DiagnosisPlan, Stages
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.reconstruction.units import TemporalAware
from tfmq_exp.report import diagnosis_figures as figures
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

Row = dict[str, Any]
WATCHING = 4  # times as long as a pass of the quantized network takes one in which all its activations are watched
WORST = 5  # rows of each printed table
WIDEST = 400  # characters of its lines


@dataclass
class Diagnosis:
    """The diagnoses of a run. Each says in its first lines what it depends on; that is its key."""

    stages: Stages

    @property
    def plan(self) -> DiagnosisPlan:
        """How much is looked at."""
        return self.stages.diagnosis

    @cached_property
    def model(self) -> QuantizedUNet:
        """The finished model, with the activation widths that it samples with."""
        _ = self.stages.corrected
        return self.stages.quantized_model

    def stored(self, name: str, inputs: Mapping[str, Any], compute: Callable[[Path, Advance], list[Row]]) -> list[Row]:
        """Rows that the store has, or that are computed now in the entry's folder, under a bar that goes to 1."""

        def fill(folder: Path) -> None:
            with self.stages.bars.stage(name, 1) as advance:
                rows = compute(folder, advance)
            self.stages.store.write_json(folder / "rows.json", rows)

        path = self.stages.pull(name, self.entry(name, inputs), fill)
        return json.loads((path / "rows.json").read_text(encoding="utf-8"))

    def passes(self) -> dict[str, int]:
        """How often one image goes through the quantized network, for every diagnosis that the store does not have."""
        followed = self.plan.trajectories * len(self.stages.calls)
        examined = self.entry("sensitivity", self.sensitivity_inputs)
        units = len(TemporalAware()(self.stages.structure, frozenset(self.stages.plan.sites)))
        left = units + 2 - len(list((examined.path / "units").glob("*.json")))
        samples = -(-self.plan.samples // (2 if self.stages.sampling.guided else 1))
        needed = {
            # float and quantized network on both trajectories
            "accumulation": (self.entry("accumulation", self.trajectory_inputs), 4 * followed),
            "ranges": (self.entry("ranges", self.trajectory_inputs), WATCHING * followed),
            "sensitivity": (examined, left * samples),
        }
        return {name: count for name, (entry, count) in needed.items() if not entry.done}

    def entry(self, name: str, inputs: Mapping[str, Any]) -> Entry:
        """Where a diagnosis is, or will be."""
        return self.stages.store.entry(f"diagnosis_{name}", inputs)

    def features(self) -> list[Row]:
        """Temporal features, layer by layer and step by step."""
        unet, structure = self.stages.denoiser.unet, self.stages.structure
        inputs = {"network": self.stages.finished.key}
        return self.stored("features", inputs, lambda _folder, _bar: feature_errors(self.model, unet, structure))

    def rounding(self) -> list[Row]:
        """Integer weights beside the nearest ones."""
        unet, structure = self.stages.denoiser.unet, self.stages.structure
        inputs = {"network": self.stages.activations.key}
        return self.stored("rounding", inputs, lambda _folder, _bar: rounding_changes(self.model, unet, structure))

    @property
    def trajectory_inputs(self) -> dict[str, Any]:
        """What is followed, and along which trajectories."""
        stages = self.stages
        count = self.plan.trajectories
        return {**stages.model_inputs, "network": stages.finished.key, "trajectories": count, "seed": stages.seed}

    def ranges(self) -> list[Row]:
        """Activations of the float model at every network call, beside the quantizers' ranges."""
        stages, calls = self.stages, len(self.stages.calls)

        def compute(_folder: Path, advance: Advance) -> list[Row]:
            return activation_ranges(
                self.model,
                stages.denoiser,
                stages.structure,
                stages.sampling,
                images=self.plan.trajectories,
                seed=stages.seed,
                batch=stages.batch,
                each_call=lambda done: advance(done / calls, f"call {done}"),
            )

        return self.stored("ranges", self.trajectory_inputs, compute)

    def accumulation(self) -> list[Row]:
        """Errors of single steps, and what accumulates from them."""
        stages = self.stages
        passes = len(stages.calls) * -(-self.plan.trajectories // stages.batch)

        def compute(_folder: Path, advance: Advance) -> list[Row]:
            return error_accumulation(
                *stages.corrected,
                stages.denoiser,
                stages.sampling,
                images=self.plan.trajectories,
                seed=stages.seed,
                batch=stages.batch,
                each_step=lambda done: advance(done / passes, ""),
            )

        return self.stored("accumulation", self.trajectory_inputs, compute)

    @property
    def sensitivity_inputs(self) -> dict[str, Any]:
        """The model, and which samples of which trajectories."""
        return {
            "network": self.stages.finished.key,
            "trajectory": self.stages.trajectory.key,
            "samples": self.plan.samples,
            "sensitivity": self.plan.sensitivity,
            "seed": self.stages.seed,
        }

    def sensitivity(self) -> list[Row]:
        """Error of the prediction that each unit makes; a finished unit is a file, from where an interrupted run goes on.

        `share` is of the whole quantized network's error: what the unit alone makes, or what leaving it float removes.
        """
        alone = self.plan.sensitivity == "alone"

        def compute(folder: Path, advance: Advance) -> list[Row]:
            stages = self.stages
            unet, structure = stages.denoiser.unet, stages.structure
            parts = quantized_parts(self.model, unet, structure)
            data = spread_over_steps(stages.calibration_set(), self.plan.samples, stages.seed)
            stick = PredictionProbe.of(
                self.model, unet, parts, data, steps=len(stages.calls), batch=min(stages.batch, len(data))
            )
            whole = stick.error(self.model)["relative_error"]
            (folder / "units").mkdir(exist_ok=True)
            files = {part.name: folder / "units" / f"{part.name}.json" for part in parts}
            own = [part for part in stages.processes.shard(parts) if not intact(files[part.name])]
            for i, part in enumerate(own):

                def each(done: float, i: int = i, name: str = part.name) -> None:
                    advance((i + done) / len(own), name)

                found = unit_error(self.model, unet, part, parts, stick, alone=alone, each_batch=each)
                write_checked(files[part.name], partial(write_json, data=found))
            stages.processes.barrier()
            rows: list[Row] = []
            for part in parts:
                found = json.loads(files[part.name].read_text(encoding="utf-8"))
                share = found["relative_error"] / whole if whole else 0.0
                rows.append({**_described(part, stages), **found, "share": share if alone else 1 - share})
            return rows

        stages = self.stages
        rows = self.stored("sensitivity", self.sensitivity_inputs, compute)
        stages.have("trajectory", stages.trajectory, stages.calibration_set)
        return rows


def _described(part: QuantizedPart, stages: Stages) -> Row:
    weights = sum(stages.structure.sites[site].weights for site in part.sites)
    return {"unit": part.name, "kind": part.kind.value, "layers": len(part.sites), "weights": weights}


Draw = Callable[[Path, str], None]


@dataclass(frozen=True)
class Finding:
    """One diagnosis for a person: what is written, and what is printed of it.

    Args:
        tables: by the name of the CSV.
        figures: by the name of the PNG.
        title: of the printed rows.
        worst: which these are.
        columns: what is printed of them.
    """

    tables: Mapping[str, list[Row]]
    figures: Mapping[str, Draw]
    title: str
    worst: list[Row]
    columns: tuple[str, ...]


def findings(diagnosis: Diagnosis) -> Iterator[Finding]:
    """All of them, the cheap ones first; those without rows (no integer weights, no quantized activations) left out."""
    rounding = diagnosis.rounding()
    if rounding:
        yield Finding(
            {"weight_rounding": rounding},
            {"weight_rounding": partial(figures.rounding_bars, rounding)},
            "weights: layers with most integers away from the nearest",
            worst(rounding, "changed"),
            ("layer", "changed", "largest_steps", "mse_ratio"),
        )
    features = diagnosis.features()
    layers = features_by_layer(features)
    yield Finding(
        {"temporal_features": features, "temporal_features_by_layer": layers},
        {"temporal_features": partial(figures.feature_map, features)},
        "temporal features: layers that moved most",
        worst(layers, "relative_mse"),
        ("layer", "relative_mse", "cosine_distance", "at_t"),
    )
    steps = diagnosis.accumulation()
    yield Finding(
        {"error_accumulation": steps},
        {"error_accumulation": partial(figures.accumulation_lines, steps)},
        "trajectory: steps with the largest error of their own",
        worst(steps, "eps_error"),
        ("step", "t", *ERRORS),
    )
    ranges = diagnosis.ranges()
    if ranges:
        changes = range_changes(ranges)
        distinct = [row for row in changes if not row["same_as"]]
        order = [row["activation"] for row in distinct]
        yield Finding(
            {"activation_ranges": ranges, "activation_changes": changes},
            {
                "activation_changes": partial(figures.range_map, ranges, order),
                "activation_ranges": partial(figures.range_lines, ranges, order),
            },
            "activations: those that the quantizer clips most",
            worst(distinct, "most_clipped"),
            ("activation", "most_clipped", "at_t", "width_change", "interval_change"),
        )
    units = diagnosis.sensitivity()
    most, other = ("share", "relative_error") if diagnosis.plan.sensitivity == "others" else ("relative_error", "share")
    yield Finding(
        {"unit_sensitivity": units},
        {"unit_sensitivity": partial(figures.sensitivity_bars, units, THIRDS)},
        "units: where the prediction's error comes from",
        worst(units, most),
        ("unit", most, other, *THIRDS),
    )


def worst(rows: list[Row], column: str) -> list[Row]:
    """The few with the largest values; none of what is 0."""
    return sorted((row for row in rows if row[column] > 0), key=lambda row: row[column], reverse=True)[:WORST]


def diagnose(stages: Stages, folder: Path, console: Console, name: str) -> None:
    """Make every diagnosis, write it into `folder`/diagnosis, mirror it, and print the worst of each."""
    target = folder / "diagnosis"
    target.mkdir(exist_ok=True)
    for finding in findings(Diagnosis(stages)):
        for table, rows in finding.tables.items():
            write_csv(target / f"{table}.csv", rows)
            stages.mirror.table(f"diagnosis/{table}", rows)
        for figure, draw in finding.figures.items():
            draw(target / f"{figure}.png", f"{figure.replace('_', ' ')}, {name}")
            stages.mirror.image(f"diagnosis/{figure}", target / f"{figure}.png")
        show(finding, console)


def show(finding: Finding, console: Console) -> None:
    """The worst rows of one diagnosis."""
    if not finding.worst:
        say(console, f"{finding.title}: none")
        return
    view = Table(title=finding.title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(finding.columns):
        view.add_column(column.replace("_", " "), justify="right" if i else "left", no_wrap=not i)
    for row in finding.worst:
        view.add_row(*(_text(row[column]) for column in finding.columns))
    wide = max(console.width, console.measure(view, options=console.options.update_width(WIDEST)).maximum)
    console.print(
        view, width=wide, crop=False, no_wrap=True
    )  # a terminal folds long lines, nobody can search folded names


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return figures.short_name(value) if isinstance(value, str) else str(value)
