"""The images of a finished run, as a file or a folder that other evaluators read.

    python scripts/export_images.py RUN_FOLDER --npz FILE [--float]
    python scripts/export_images.py RUN_FOLDER --png FOLDER [--float]

The file is in guided-diffusion's sample format: `arr_0`, uint8, (N, H, W, C). The folder gets a PNG for each image, named by
its index. `--float` takes the images of the float network instead of the quantized one's.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams
from tfmq_exp.core.files import write_atomically
from tfmq_exp.evaluation.npz import write_npz
from tfmq_exp.pipeline.store import Entry


def main() -> int:
    """Export, and say what was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that has sampled images")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--npz", type=Path, metavar="FILE")
    target.add_argument("--png", type=Path, metavar="FOLDER")
    parser.add_argument("--float", action="store_true", help="images of the float network")
    args = parser.parse_args()
    try:
        shards = find_shards(args.run, "float images" if args.float else "images")
        count, shape = measure(shards)
        if args.npz:
            args.npz.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.npz, lambda path: write_npz(path, count, shape, read(shards)))
        else:
            write_png(args.png, read(shards))
    except (OSError, ValueError) as error:
        say_error(Terminal(stderr=True), str(error))
        return 1
    print(f"{count} images {shape}: {args.npz or args.png}")
    return 0


def find_shards(run: Path, name: str) -> list[Path]:
    """The files of a run's images, in the order of their indices, checked against their hashes.

    Raises:
        FileNotFoundError: the run has no images, or the store no longer has them.
        ValueError: damaged files.
    """
    record = run / "artifacts.json"
    if not record.is_file():
        raise FileNotFoundError(f"{run} is no folder of a finished run: there is no {record.name}")
    hits = json.loads(record.read_text(encoding="utf-8"))
    if name not in hits:
        raise FileNotFoundError(
            f"{run} has no {name}: run it with until=images or until=scores; it has {', '.join(hits)}"
        )
    stored = Path(hits[name]["path"])  # relative to where the run was started, which is above the run's folder
    places = [parent / stored for parent in (Path(), *run.resolve().parents)]
    entries = [Entry("images", hits[name]["key"], place, {}) for place in places]
    found = next((entry for entry in entries if entry.done), None)
    if found is None:
        raise FileNotFoundError(f"the {name} of {run} are no longer in the store: {stored}; run it again")
    found.verify()
    return sorted(found.path.glob("images-*.safetensors"))


def measure(shards: list[Path]) -> tuple[int, tuple[int, int, int]]:
    """Number of images, and their (channels, height, width), from the headers of the files."""
    count, shape = 0, (0, 0, 0)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            images, *rest = file.get_slice("images").get_shape()
        count, shape = count + images, tuple(rest)
    return count, shape


def read(shards: list[Path]) -> Iterator[Tensor]:
    """The images, a file at a time."""
    for shard in shards:
        yield load_file(shard)["images"]


def write_png(folder: Path, shards: Iterator[Tensor]) -> None:
    """A PNG for each image, gray where there is one channel; the folder is there with all of them, or not at all.

    Raises:
        ValueError: the folder has files, which would be taken for images of this run.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    partial = folder.resolve().with_name(f"{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    index = 0
    for images in shards:
        for image in images:
            pixels = image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0)
            Image.fromarray(pixels.contiguous().numpy()).save(partial / f"{index:06d}.png")
            index += 1
    partial.replace(folder)


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
