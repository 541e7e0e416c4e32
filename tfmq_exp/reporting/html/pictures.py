"""Pictures inside the page: made smaller, so many at most."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from tfmq_exp.report.html.runs import Run
from tfmq_exp.report.html.ways import Group
from tfmq_exp.report.tables import engine_of

PICTURES = 40  # of one kind in a page
WIDEST = 1400  # pixels
QUALITY = 82  # of WebP


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows; `uri` holds all of it."""

    title: str
    uri: str
    width: int
    height: int


def inlined(path: Path, title: str) -> Picture:
    """A file as a picture of the page: the smaller of WebP and what it is.

    Raises:
        OSError: no picture.
    """
    given = path.read_bytes()
    with Image.open(io.BytesIO(given)) as image:
        image.load()
        kind, whole, small = image.format, image.size, trimmed(image.convert("RGB"))
    small.thumbnail((WIDEST, 8 * WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    found = {"image/webp": buffer.getvalue()}
    if small.size == whole and kind == "PNG":
        found["image/png"] = given
    form, smallest = min(found.items(), key=lambda item: len(item[1]))
    uri = f"data:{form};base64,{base64.b64encode(smallest).decode()}"
    return Picture(title, uri, small.width, small.height)


def trimmed(image: Image.Image) -> Image.Image:
    """Without the even border around what is drawn."""
    paper = Image.new("RGB", image.size, image.getpixel((0, 0)))  # type: ignore[arg-type]
    box = ImageChops.difference(image, paper).getbbox()
    return image.crop(box) if box else image


@dataclass(frozen=True)
class Grid:
    """A file of samples: the heading that it stands under, and what it is."""

    heading: str
    title: str
    path: Path


def sample_files(groups: Sequence[Group], runs: Sequence[Run]) -> tuple[list[Grid], int]:
    """Grids of samples to show, and how many there are: before any second seed the first of every way.

    Grids of runs without scores come last.
    """
    found: list[tuple[int, int, Grid]] = []
    for group in groups:
        for way in group.quantized:
            for turn, member in enumerate(way.members):
                model = f"{group.model} ({group.distinction})" if group.distinction else group.model
                title = f"{model} {way.bits} {way.label}, seed {member.record.seed}"
                file = "samples_deployed.png" if engine_of(member.record) else "samples.png"
                grid = Grid(f"{model} {way.label}", title, member.run.folder / file)
                found.append((turn, len(found), grid))
    for run in runs:
        if not run.records:
            found.append((len(runs), len(found), Grid("runs without scores", run.name, run.folder / "samples.png")))
    there = sorted((item for item in found if item[2].path.is_file()), key=lambda item: item[:2])
    shown = sorted(there[:PICTURES], key=lambda item: item[1])
    return [grid for *_, grid in shown], len(there)


def albums(grids: Sequence[Grid], problems: list[str]) -> dict[str, list[Picture]]:
    """Pictures of samples under their headings: a method's bits and seeds together."""
    files: dict[str, list[tuple[str, Path]]] = {}
    for grid in grids:
        files.setdefault(grid.heading, []).append((grid.title, grid.path))
    found = {heading: gallery(some, problems) for heading, some in files.items()}
    return {heading: pictures for heading, pictures in found.items() if pictures}


def gallery(files: Sequence[tuple[str, Path]], problems: list[str]) -> list[Picture]:
    """The files as pictures; a damaged one is named among the problems."""
    pictures: list[Picture] = []
    for title, path in files:
        try:
            pictures.append(inlined(path, title))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            problems.append(f"{title}: {path.name} is no picture, or a damaged one")
    return pictures
