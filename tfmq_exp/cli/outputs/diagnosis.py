"""Diagnoses of a run as tables and figures in its folder; the worst rows of each are printed."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.outputs.run_folder import write_csv
from tfmq_exp.cli.terminal import say
from tfmq_exp.diagnostics.activation_ranges import range_changes
from tfmq_exp.diagnostics.sensitivity import THIRDS
from tfmq_exp.diagnostics.temporal_error import features_by_layer
from tfmq_exp.diagnostics.trajectory_error import ERRORS
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.report import figures, heat_maps, similarity_figures

Row = dict[str, Any]
Draw = Callable[[Path, str], None]
WORST_ROWS = 5  # of each printed table
WIDEST_LINE = 400  # characters


class Finding(NamedTuple):
    """One diagnosis as it is shown: tables by the name of the CSV, figures by that of the PNG, and the worst rows."""

    tables: Mapping[str, list[Row]]
    figures: Mapping[str, Draw]
    title: str
    worst: list[Row]
    columns: tuple[str, ...]


def findings(experiment: Experiment) -> Iterator[Finding]:
    """All diagnoses, computed one after the other; those without rows (no integer weights, no quantized activations) left out."""
    diagnoses = {name: stage.rows for name, stage in experiment.diagnoses.items()}
    if rounding := diagnoses["rounding"]():
        yield Finding(
            {"weight_rounding": rounding},
            {"weight_rounding": partial(figures.rounding_bars, rounding)},
            "weights: layers with most integers away from the nearest",
            worst(rounding, "changed"),
            ("layer", "changed", "largest_steps", "mse_ratio"),
        )
    features = diagnoses["features"]()
    layers = features_by_layer(features)
    yield Finding(
        {"temporal_features": features, "temporal_features_by_layer": layers},
        {"temporal_features": partial(heat_maps.feature_map, features)},
        "temporal features: layers that moved most",
        worst(layers, "relative_mse"),
        ("layer", "relative_mse", "cosine_distance", "at_t"),
    )
    steps = diagnoses["accumulation"]()
    yield Finding(
        {"error_accumulation": steps},
        {"error_accumulation": partial(figures.error_curves, "accumulation", steps)},
        "trajectory: steps with the largest error of their own",
        worst(steps, "eps_error"),
        ("step", "t", *ERRORS),
    )
    yield from similarity_findings(experiment)
    if ranges := diagnoses["ranges"]():
        changes = range_changes(ranges)
        distinct = [row for row in changes if not row["same_as"]]
        order = [row["activation"] for row in distinct]
        maps = {"activation_changes": heat_maps.range_map, "activation_ranges": figures.range_lines}
        yield Finding(
            {"activation_ranges": ranges, "activation_changes": changes},
            {name: partial(draw, ranges, order) for name, draw in maps.items()},
            "activations: those that the quantizer clips most",
            worst(distinct, "most_clipped"),
            ("activation", "most_clipped", "at_t", "width_change", "interval_change"),
        )
    units, others = diagnoses["sensitivity"](), experiment.run.diagnosis.sensitivity == "others"
    most, other = ("share", "relative_error") if others else ("relative_error", "share")
    yield Finding(
        {"unit_sensitivity": units},
        {"unit_sensitivity": partial(figures.sensitivity_bars, units, THIRDS)},
        "units: where the prediction's error comes from",
        worst(units, most),
        ("unit", most, other, *THIRDS),
    )


def similarity_findings(experiment: Experiment) -> Iterator[Finding]:
    """Similarity of blocks, and the attention that chosen words get."""
    stage = experiment.similarity
    blocks = stage.rows()
    changes = [{**row, "distance": None if row["cka"] is None else 1 - row["cka"]} for row in blocks]
    yield Finding(
        {"block_similarity": blocks},
        {
            f"block_{name}": partial(similarity_figures.similarity_map, blocks, name)
            for name in similarity_figures.MEASURES
        },
        "features: blocks and steps that differ most",
        worst(changes, "distance"),
        ("block", "t", "cka", "cosine"),
    )
    rows, maps = stage.attention()
    if rows:
        captions = {word: stage.captions[min(images)] for word, images in stage.places.items()}
        arrays = {word: maps[word].numpy() for word in captions}
        changes = [{**row, "distance": 1 - row["correlation"]} for row in rows if row["correlation"] is not None]
        yield Finding(
            {"attention_maps": rows},
            {"attention_maps": partial(similarity_figures.attention_figure, arrays, rows, captions, THIRDS)},
            "attention: words whose maps differ most",
            worst(changes, "distance"),
            ("word", "third", "height", "width", "correlation", "float", "quantized"),
        )


def worst(rows: list[Row], column: str) -> list[Row]:
    """The rows with the largest values above 0."""
    return sorted((row for row in rows if (row[column] or 0) > 0), key=lambda row: row[column], reverse=True)[
        :WORST_ROWS
    ]


def save_diagnoses(experiment: Experiment, folder: Path, console: Console, name: str) -> None:
    """Compute every diagnosis, write its tables and figures into the folder, log them, and print its worst rows.

    `name` is that of the run, in the titles of figures.
    """
    folder.mkdir(exist_ok=True)
    logger = experiment.pipeline.logger
    for finding in findings(experiment):
        for table, rows in finding.tables.items():
            write_csv(folder / f"{table}.csv", rows)
            logger.log_table(f"diagnosis/{table}", rows)
        for figure, draw in finding.figures.items():
            draw(folder / f"{figure}.png", f"{figure.replace('_', ' ')}, {name}")
            logger.log_image(f"diagnosis/{figure}", folder / f"{figure}.png")
        print_finding(finding, console)


def print_finding(finding: Finding, console: Console) -> None:
    """Print the worst rows of a diagnosis."""
    if not finding.worst:
        say(console, f"{finding.title}: none")
        return
    view = Table(title=finding.title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(finding.columns):
        view.add_column(column.replace("_", " "), justify="right" if i else "left", no_wrap=not i)
    for row in finding.worst:
        values = [row[column] for column in finding.columns]
        texts = [figures.short_name(value) if isinstance(value, str) else value for value in values]
        view.add_row(*(f"{text:.4g}" if isinstance(text, float) else str(text) for text in texts))
    wide = max(console.width, console.measure(view, options=console.options.update_width(WIDEST_LINE)).maximum)
    # a terminal folds long lines; names that were folded here could not be searched for
    console.print(view, width=wide, crop=False, no_wrap=True)
