"""Samples and diagnoses of run folders: pictures inside the page, and heads of tables, limited in number and size."""

import base64
import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
MAX_DESCRIPTION = 1000  # characters
Picture = dict[str, Any]  # title, description that the file holds, uri with all of it, width, height


def inline_picture(path: Path, title: str) -> Picture:
    """Read a file as a picture of the page without its even border: the smaller of WebP and the file itself.

    Raises:
        OSError: no picture.
    """
    original = path.read_bytes()
    with Image.open(io.BytesIO(original)) as image:
        image.load()
        kind, small = image.format, image.convert("RGB")
        description = str(image.info.get("Description", ""))[:MAX_DESCRIPTION]
        whole, paper = small.size, Image.new("RGB", small.size, small.getpixel((0, 0)))  # type: ignore[arg-type]
    small = small.crop(ImageChops.difference(small, paper).getbbox())  # all of it where nothing differs
    small.thumbnail((MAX_WIDTH, 8 * MAX_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    found = {"image/webp": buffer.getvalue()}
    if small.size == whole and kind == "PNG":
        found["image/png"] = original
    mime, smallest = min(found.items(), key=lambda item: len(item[1]))
    uri = f"data:{mime};base64,{base64.b64encode(smallest).decode()}"
    return {"title": title, "description": description, "uri": uri, "width": small.width, "height": small.height}


def albums(groups: Sequence[Group], runs: Sequence[Run], problems: list[str]) -> tuple[dict[str, list[Picture]], int]:
    """The grids of samples under their headings (a method's bits and seeds together), and how many are left out.

    Where there are too many, those of a variant's first seed come before those of any second seed, and those of runs
    without scores last.
    """
    files: list[tuple[int, str, str, Path]] = []  # turn, heading, title
    for group in groups:
        model = f"{group.first.model} ({group.distinction})" if group.distinction else group.first.model
        for variant in group.quantized:
            name = "samples_deployed.png" if variant.engine else "samples.png"
            for turn, (record, run) in enumerate(zip(variant.records, variant.runs, strict=True)):
                title = f"{model} {variant.name}, seed {record.seed}"
                files.append((turn, f"{model} {variant.label}", title, run.folder / name))
    alone = [run for run in runs if not run.records]
    files += [(len(runs), "runs without scores", run.name, run.folder / "samples.png") for run in alone]
    files = [file for file in files if file[3].is_file()]
    first = sorted(range(len(files)), key=lambda i: files[i][0])[:MAX_PICTURES]
    headings = group_by((files[i] for i in sorted(first)), lambda file: file[1])
    found = {name: gallery([file[2:] for file in same], problems) for name, same in headings.items()}
    return {name: pictures for name, pictures in found.items() if pictures}, len(files) - len(first)


def gallery(files: Iterable[tuple[str, Path]], problems: list[str]) -> list[Picture]:
    """The files as pictures; a damaged one is named among the problems."""
    pictures: list[Picture] = []
    for title, path in files:
        try:
            pictures.append(inline_picture(path, title))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            problems.append(f"{title}: {path.name} is no picture, or a damaged one")
    return pictures


def diagnosis_folders(runs: Sequence[Run], problems: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Plots and tables of the first runs that have some, and how many more do; damaged files are among the problems."""
    own = [run for run in runs if run.state != "found" and not run.saved and (run.folder / "diagnosis").is_dir()]
    found: list[dict[str, Any]] = []
    for run in own[:MAX_DIAGNOSES]:
        folder = run.folder / "diagnosis"
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".csv"))
        kinds = group_by(files[:MAX_FILES], lambda path: path.suffix.lower())
        pictures = gallery([(str(path.relative_to(folder)), path) for path in kinds.get(".png", ())], problems)
        tables = [head for path in kinds.get(".csv", ()) if (head := _head(path, problems))]
        left_out = max(0, len(files) - MAX_FILES)
        found.append({"name": run.name, "pictures": pictures, "tables": tables, "left_out": left_out})
    return found, max(0, len(own) - MAX_DIAGNOSES)


def _head(path: Path, problems: list[str]) -> dict[str, Any]:
    """The first lines of a CSV file, and whether there are more; empty without any."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(itertools.islice(csv.reader(file), MAX_LINES + 2))
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path} cannot be read: {error}")
        return {}
    rows = [list(map(_short, row)) for row in lines[1 : MAX_LINES + 1]]
    return {"title": path.name, "header": lines[0], "rows": rows, "more": lines[MAX_LINES + 1 :]} if lines else {}


def _short(text: str) -> str:
    """A number with five significant digits; other text and integers as they are."""
    try:
        return text if text.lstrip("-").isdecimal() else f"{float(text):.5g}"
    except ValueError:
        return text
