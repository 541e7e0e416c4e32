"""Files and lines of a comparison with the float model's images, of a run or of any images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tfmq_exp.cli.terminal import say, visible
from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.core.seeds import Stream
from tfmq_exp.evaluation.image_sources import BatchedImages, ImageSource, read_pairs
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.stages.evaluation import SampleImages
from tfmq_exp.pipeline.stages.image_comparison import CompareImages
from tfmq_exp.report.html.comparison_page import Pair, Pixels, chosen_pairs, order_distance, render_comparison
from tfmq_exp.report.image_distances import DISTANCES, DISTANCES_FILE, FLOAT_AGAIN, QUANTIZED, Values, write_distances
from tfmq_exp.report.paired_tables import NetworkImages, distance_table

MADE_OTHERWISE = {"batch": "another batch", "bfloat16": "another precision", "threads": "other threads"}


def compared_networks(experiment: Experiment) -> dict[str, CompareImages]:
    """Comparisons of a run by the names of networks in the file of distances: float ones first."""
    floor = {f"{FLOAT_AGAIN}{MADE_OTHERWISE[kind]}": stage for kind, stage in experiment.floor.items()}
    export, deployed = experiment.export, experiment.deployed
    engine = {export.name: deployed.comparison} if export and deployed else {}
    return {**floor, QUANTIZED: experiment.simulated.comparison, **engine}


def save_comparison(experiment: Experiment, folder: Path) -> None:
    """Write the distances of every image, and their summaries."""
    stages = compared_networks(experiment)
    for floor in experiment.floor.values():  # also where they were deleted, and their comparison was not
        experiment.pipeline.require(floor.images)
    values = {name: stage.values() for name, stage in stages.items()}
    write_atomically(folder / DISTANCES_FILE, lambda path: write_distances(path, values))
    write_json(folder / "comparison.json", {name: stage.summary() for name, stage in stages.items()})


def save_page(experiment: Experiment, folder: Path, console: Console, names: tuple[str, str], seed: int) -> None:
    """Write the page of a run, print its table, and say where it is.

    Args:
        experiment: whose images are compared.
        folder: of the run.
        console: the terminal.
        names: of bits and method.
        seed: of the run.
    """
    if not experiment.pipeline.group.is_main:
        return
    run, stages = experiment.run, compared_networks(experiment)
    networks = {
        name: NetworkImages("fp32", name, {seed: stage.values()}, floor=True)
        if name.startswith(FLOAT_AGAIN)
        else NetworkImages(names[0], names[1] if name == QUANTIZED else f"{names[1]} by {name}", {seed: stage.values()})
        for name, stage in stages.items()
    }
    chosen = run.sampling.conditioning.choose(run.images.seed, Stream.IMAGES, range(run.images.count))
    captions = [text if isinstance(text, str) else "" for text in chosen]
    exact, distance = stored(experiment.float_images, "float"), order_distance([*networks.values()])
    pairs = {
        networks[name].name: shown_pairs(
            exact,
            stored(stage.images, name),
            range(run.images.count),
            networks[name].seeds[seed],
            distance,
            captions,
        )
        for name, stage in stages.items()
        if not networks[name].floor
    }
    title = f"{run.denoiser.name} {' '.join(names)}"
    lead = f"{run.images.count} images of seed {seed}, each beside the float model's of the same noise."
    text = render_comparison(title, lead, [*networks.values()], pairs)
    target = folder / "comparison.html"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"))
    print_distances([*networks.values()], console)
    say(console, f"pairs to look at: {target}")


def stored(stage: SampleImages, title: str) -> BatchedImages:
    """The images of a stage."""
    return BatchedImages(title, stage.run.images.count, stage.images)


def shown_pairs(
    exact: ImageSource,
    other: ImageSource,
    matching: Sequence[int],
    values: Values,
    distance: str,
    captions: Sequence[str] = (),
) -> dict[str, list[Pair]]:
    """Pairs that a page shows, by heading.

    Args:
        exact: images of the float model.
        other: of another network.
        matching: index in `other` for every image of `exact`.
        values: of every pair, by distance.
        distance: that pairs are sorted by.
        captions: what each image was made from; empty where there is nothing to say.
    """
    headings = chosen_pairs(values[distance], DISTANCES[distance].better)
    indices = sorted(i for part in headings.values() for i in part)
    found: dict[int, Pair] = {}
    for i, (image, own) in zip(indices, read_pairs(exact, other, indices, matching), strict=True):
        name = exact.names[i] if exact.names else f"image {i}"
        numbers = {key: numbers[i] for key, numbers in values.items()}
        found[i] = Pair(name, captions[i] if captions else "", pixels(own), pixels(image), numbers)
    return {heading: [found[i] for i in part] for heading, part in headings.items()}


def pixels(image: Tensor) -> Pixels:
    """An image as RGB, channels last."""
    return np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())


def print_distances(networks: Sequence[NetworkImages], console: Console) -> None:
    """Print a line for each network and distance: mean, and the values that 5, 50 and 95 % of the images stay below."""
    header, rows = distance_table(networks)
    view = Table(title="distances from the float images: mean (5 %, 50 %, 95 %)", title_justify="left")
    for heading in ("network", "distance", "value"):
        view.add_column(heading, overflow="fold")
    for row in rows:
        for name, text in zip(header[2:], row[2:], strict=True):
            view.add_row(visible(f"{row[0]} {row[1]}".strip()), name, text)
        view.add_section()
    console.print(view)
