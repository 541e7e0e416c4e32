"""Samples and diagnoses of run folders: pictures inside the page, and heads of tables, limited in number and size."""

import base64
import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.html.grouping import Group
from tfmq_exp.report.html.run_reader import Run

MAX_PICTURES = 40  # of samples in a page
MAX_WIDTH = 1400  # pixels
QUALITY = 82  # of WebP
MAX_DIAGNOSES = 12  # runs whose `diagnosis/` folders are shown
MAX_FILES = 24  # of one such folder
MAX_LINES = 40  # of a table


class Picture(NamedTuple):
    """A picture with its caption; `uri` holds all of it."""

    title: str
    uri: str
    width: int
    height: int


def inline_picture(path: Path, title: str) -> Picture:
    """Read a file as a picture of the page: the smaller of WebP and the file itself.

    Raises:
        OSError: no picture.
    """
    original = path.read_bytes()
    with Image.open(io.BytesIO(original)) as image:
        image.load()
        kind, whole, small = image.format, image.size, cropped(image.convert("RGB"))
    small.thumbnail((MAX_WIDTH, 8 * MAX_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    found = {"image/webp": buffer.getvalue()}
    if small.size == whole and kind == "PNG":
        found["image/png"] = original
    mime, smallest = min(found.items(), key=lambda item: len(item[1]))
    uri = f"data:{mime};base64,{base64.b64encode(smallest).decode()}"
    return Picture(title, uri, small.width, small.height)


def cropped(image: Image.Image) -> Image.Image:
    """The picture without its even border."""
    paper = Image.new("RGB", image.size, image.getpixel((0, 0)))  # type: ignore[arg-type]
    box = ImageChops.difference(image, paper).getbbox()
    return image.crop(box) if box else image


class SampleFile(NamedTuple):
    """A file with a grid of samples, its caption, and the heading of all grids of its method."""

    heading: str
    title: str
    path: Path


def sample_files(groups: Sequence[Group], runs: Sequence[Run]) -> tuple[list[SampleFile], int]:
    """The grids of samples to show, and how many there are.

    Where there are too many, those of a variant's first seed come before those of any second seed, and those of runs
    without scores last.
    """
    files = [(turn, file) for turn, file in _sample_files(groups, runs) if file.path.is_file()]
    first = sorted(range(len(files)), key=lambda i: files[i][0])[:MAX_PICTURES]
    return [files[i][1] for i in sorted(first)], len(files)


def _sample_files(groups: Sequence[Group], runs: Sequence[Run]) -> Iterator[tuple[int, SampleFile]]:
    for group in groups:
        model = f"{group.model} ({group.distinction})" if group.distinction else group.model
        for variant in group.quantized:
            name = "samples_deployed.png" if variant.engine else "samples.png"
            for turn, member in enumerate(variant.members):
                title = f"{model} {variant.name}, seed {member.record.seed}"
                yield turn, SampleFile(f"{model} {variant.label}", title, member.run.folder / name)
    for run in runs:
        if not run.records:
            yield len(runs), SampleFile("runs without scores", run.name, run.folder / "samples.png")


def albums(files: Iterable[SampleFile], problems: list[str]) -> dict[str, list[Picture]]:
    """Pictures of samples under their headings: a method's bits and seeds together."""
    headings = group_by(files, lambda file: file.heading)
    found = {name: gallery([(f.title, f.path) for f in same], problems) for name, same in headings.items()}
    return {name: pictures for name, pictures in found.items() if pictures}


def gallery(files: Sequence[tuple[str, Path]], problems: list[str]) -> list[Picture]:
    """The files as pictures; a damaged one is named among the problems."""
    pictures: list[Picture] = []
    for title, path in files:
        try:
            pictures.append(inline_picture(path, title))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            problems.append(f"{title}: {path.name} is no picture, or a damaged one")
    return pictures


class TableHead(NamedTuple):
    """The first lines of a CSV file; `more` says whether there are others."""

    title: str
    header: list[str]
    rows: list[list[str]]
    more: bool


class DiagnosisFolder(NamedTuple):
    """Plots and tables of one run."""

    name: str
    pictures: list[Picture]
    tables: list[TableHead]
    left_out: int


def diagnosis_folders(runs: Sequence[Run], problems: list[str]) -> tuple[list[DiagnosisFolder], int]:
    """The folders of the first runs that have one, and how many more do; damaged files are named among the problems."""
    own = [run for run in runs if run.state != "found" and not run.saved and (run.folder / "diagnosis").is_dir()]
    return [_read_folder(run, problems) for run in own[:MAX_DIAGNOSES]], max(0, len(own) - MAX_DIAGNOSES)


def _read_folder(run: Run, problems: list[str]) -> DiagnosisFolder:
    folder = run.folder / "diagnosis"
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".csv"))
    plots = [(str(path.relative_to(folder)), path) for path in files[:MAX_FILES] if path.suffix.lower() == ".png"]
    pictures = gallery(plots, problems)
    tables = [head for path in files[:MAX_FILES] if path.suffix.lower() == ".csv" and (head := _head(path, problems))]
    return DiagnosisFolder(run.name, pictures, tables, max(0, len(files) - MAX_FILES))


def _head(path: Path, problems: list[str]) -> TableHead | None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(itertools.islice(csv.reader(file), MAX_LINES + 2))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    if not lines:
        return None
    header, *rows = lines
    return TableHead(path.name, header, [list(map(_short, row)) for row in rows[:MAX_LINES]], len(rows) > MAX_LINES)


def _short(text: str) -> str:
    """A number with five significant digits; other text and integers as they are."""
    try:
        return text if text.lstrip("-").isdecimal() else f"{float(text):.5g}"
    except ValueError:
        return text
