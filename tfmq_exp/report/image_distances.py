"""Distances of images from the float model's images of the same noise: their names, their file of values, and summaries."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DISTANCES_FILE = "image_distances.csv"  # of a run folder: a line for each network and image
QUANTIZED, FLOAT_AGAIN = "quantized", "float, "  # names of networks in it: the simulation, and how float ones begin
QUANTILES = (5, 25, 50, 75, 95)  # percent
Values = Mapping[str, Sequence[float]]  # by distance: one value for each image, in the order of the images


class Distance(NamedTuple):
    """A distance of two images, as tables show it."""

    name: str
    title: str
    digits: int
    better: str  # an arrow to the side of alike images


DISTANCES = {
    distance.name: distance
    for distance in (
        Distance("psnr", "PSNR, dB", 2, "↑"),
        Distance("ssim", "SSIM", 4, "↑"),
        Distance("ms_ssim", "MS-SSIM", 4, "↑"),
        Distance("lpips_alex", "LPIPS (AlexNet)", 4, "↓"),
        Distance("lpips_vgg", "LPIPS (VGG)", 4, "↓"),
        Distance("digits_features", "distance of digits features", 4, "↓"),
    )
}


def summarize(values: Values) -> dict[str, dict[str, float]]:
    """Mean and quantiles of each distance; ValueError for a value that is not finite."""
    found: dict[str, dict[str, float]] = {}
    for name, numbers in values.items():
        if wrong := [i for i, value in enumerate(numbers) if not math.isfinite(value)]:
            raise ValueError(f"{name} of image {wrong[0]} is not finite")
        # between neighbours in proportion, as numpy has it; a single value is all of its quantiles
        steps = statistics.quantiles([*numbers, *numbers][: max(2, len(numbers))], n=20, method="inclusive")
        quantiles = {f"q{percent:02d}": steps[percent // 5 - 1] for percent in QUANTILES}
        found[name] = {"mean": statistics.fmean(numbers), **quantiles}
    return found


def write_distances(path: Path, networks: Mapping[str, Values]) -> None:
    """Write the values of some networks, a line for each image."""
    names = list(dict.fromkeys(name for values in networks.values() for name in values))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["network", "image", *names])
        for network, values in networks.items():
            count = len(next(iter(values.values()), ()))
            columns = [[f"{v:.9g}" for v in values[n]] if n in values else [""] * count for n in names]
            writer.writerows([network, i, *row] for i, row in enumerate(zip(*columns, strict=True)))


def read_distances(path: Path) -> dict[str, dict[str, list[float]]]:
    """Values by network and distance, as `write_distances` has written them.

    Raises:
        ValueError: another file, unknown distances, or images that are not in order.
    """
    found: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header[:2] != ["network", "image"] or not set(header[2:]) <= set(DISTANCES):
            right = f"network,image and some of {', '.join(DISTANCES)}"
            raise ValueError(f"{path}: the first line is {','.join(header)[:80]!r}, expected {right}")
        for network, image, *numbers in reader:
            if image != str(counts.get(network, 0)) or len(numbers) != len(header) - 2:
                raise ValueError(f"{path}: expected image {counts.get(network, 0)} of {network}, got {image}")
            counts[network] = int(image) + 1
            own = found.setdefault(network, {})
            for name, number in zip(header[2:], numbers, strict=True):
                if number:
                    own.setdefault(name, []).append(_finite(number, path))
    if wrong := [(n, d) for n, own in found.items() for d, values in own.items() if len(values) != counts[n]]:
        raise ValueError(f"{path}: {wrong[0][1]} of {wrong[0][0]} is not there for every image")
    return found


def _finite(text: str, path: Path) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{path}: {text} is not finite")
    return value
