"""The images of a finished run, as a file or a folder that other evaluators read.

    python scripts/export_images.py RUN_FOLDER --npz FILE [--float]
    python scripts/export_images.py RUN_FOLDER --png FOLDER [--float]

The file is in guided-diffusion's sample format: `arr_0`, uint8, (N, H, W, C). The folder gets a PNG for each image, named by
its index. `--float` takes the images of the float network instead of the quantized one's.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams
from tfmq_exp.core.files import write_atomically
from tfmq_exp.evaluation.npz import write_npz
from tfmq_exp.pipeline.stored_images import StoredImages


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
        images = StoredImages(args.run, "float images" if args.float else "images")
        if args.npz:
            args.npz.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.npz, lambda path: write_npz(path, len(images), images.shape, images))
        else:
            write_png(args.png, images)
    except (OSError, ValueError) as error:
        say_error(Terminal(stderr=True), str(error))
        return 1
    print(f"{len(images)} images {images.shape}: {args.npz or args.png}")
    return 0


def write_png(folder: Path, shards: Iterable[Tensor]) -> None:
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
