"""Images of networks against the float model's of the same noise: distances pair by pair, and a page to look at them.

    python scripts/compare_images.py FLOAT QUANTIZED... [--prompts FILE] [--out FOLDER]
    python scripts/compare_images.py FLOAT QUANTIZED... --floor FLOAT_AGAIN --lpips alex --weights FILE

Each is a folder of images (png, jpg, webp and others, at any depth), a `.npz` file with `arr_0`, or the folder of a run, of
which FLOAT takes the float images and QUANTIZED the quantized ones. Folders of images are matched by name, everything else
by index. `--floor` is the float model once more: another batch, another precision, another machine.

The folder gets comparison.html, which loads nothing else, comparison.json, and image_distances.csv with every pair.
"""

import argparse
import sys
from pathlib import Path

from tfmq_exp.cli.outputs.comparison import print_distances, shown_pairs
from tfmq_exp.cli.terminal import Terminal, say, say_error, standard_streams
from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.core.text_files import read_lines
from tfmq_exp.evaluation.image_comparison import ComparedImages, ImageComparison
from tfmq_exp.evaluation.image_sources import (
    BatchedImages,
    FolderImages,
    ImageSource,
    batched_pairs,
    matching_indices,
    npz_source,
    read_pairs,
)
from tfmq_exp.evaluation.perceptual_distances import RELEASED, lpips
from tfmq_exp.pipeline.stored_images import StoredImages
from tfmq_exp.report.html.comparison_page import order_distance, render_comparison
from tfmq_exp.report.image_distances import DISTANCES, FLOAT_AGAIN, write_distances
from tfmq_exp.report.paired_tables import NetworkImages, distances_in, paired_table, summary_of
from tfmq_exp.report.tables import render


def main() -> int:
    """Compare, print, and write the files."""
    args = arguments()
    try:
        compare(args, Terminal())
    except (OSError, ValueError) as error:
        say_error(Terminal(stderr=True), str(error))
        return 1
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path, metavar="FLOAT")
    parser.add_argument("quantized", type=Path, nargs="+", metavar="QUANTIZED")
    parser.add_argument("--floor", type=Path, action="append", default=[], help="images of a second float run")
    parser.add_argument("--prompts", type=Path, help="a text file with a caption for each image, in the images' order")
    parser.add_argument("--against", help="the one of QUANTIZED that others are compared with (default: the best)")
    parser.add_argument("--lpips", choices=tuple(RELEASED), help="also LPIPS by this network")
    parser.add_argument("--weights", help="with --lpips: torchvision's file of that network")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder of the results (default: comparison)"
    )
    args = parser.parse_args()
    if bool(args.lpips) != bool(args.weights):
        parser.error("--lpips and --weights belong together: nothing is downloaded")
    return args


def compare(args: argparse.Namespace, console: Terminal) -> None:
    """Compare every folder with the float one.

    Raises:
        ValueError, OSError: images that cannot be read or do not match.
    """
    exact = open_source(args.float, "float images")
    captions = read_lines(args.prompts) if args.prompts else []
    if args.prompts and len(captions) != len(exact):
        raise ValueError(f"{args.prompts} has {len(captions)} lines, and {exact.title} has {len(exact)} images")
    measure = ImageComparison((lpips(args.weights, args.lpips),) if args.lpips else ())
    others = [(open_source(path, "float images"), True) for path in args.floor]
    others += [(open_source(path, "images"), False) for path in args.quantized]
    titles = [f"{FLOAT_AGAIN if floor else ''}{other.title}" for other, floor in others]
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise ValueError(f"{min(twice)} is given twice")
    short = [f"{FLOAT_AGAIN if floor else ''}{Path(other.title).resolve().name}" for other, floor in others]
    titles = short if len(set(short)) == len(short) else titles
    matchings = [matching_indices(exact, other) for other, _ in others]  # all names first: reading takes long
    networks: list[NetworkImages] = []
    found: dict[str, ComparedImages] = {}
    for (other, floor), title, matching in zip(others, titles, matchings, strict=True):
        found[title] = measure(batched_pairs(read_pairs(exact, other, range(len(exact)), matching)))
        networks.append(NetworkImages("", title, {0: found[title].values}, floor=floor))
    write_files(args, exact, others, matchings, networks, captions, console)
    for title, compared in found.items():
        if compared.identical:
            say(console, f"{title}: {compared.identical} of {len(exact)} pairs are the same, byte by byte")


def open_source(path: Path, stage: str) -> ImageSource:
    """The images of a folder, a `.npz` file, or a run.

    Raises:
        ValueError: nothing of these.
    """
    if path.is_file():
        return npz_source(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not there; expected a folder of images, a .npz file, or the folder of a run")
    if (path / "artifacts.json").is_file():
        images = StoredImages(path, stage)
        return BatchedImages(str(path), len(images), lambda: images)
    return FolderImages(path)


def write_files(
    args: argparse.Namespace,
    exact: ImageSource,
    others: list[tuple[ImageSource, bool]],
    matchings: list[list[int]],
    networks: list[NetworkImages],
    captions: list[str],
    console: Terminal,
) -> None:
    """Print the tables and write the results.

    Args:
        args: command line.
        exact: the float images.
        others: the other ones, and whether they are float ones.
        matchings: the index in each of them for every float image.
        networks: their distances.
        captions: of the float images; empty without any.
        console: the terminal.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    distance = order_distance(networks)
    pairs = {
        network.name: shown_pairs(exact, other, matching, network.seeds[0], distance, captions)
        for (other, floor), matching, network in zip(others, matchings, networks, strict=True)
        if not floor
    }
    lead = f"{len(exact)} images, each beside the one of {exact.title}."
    page = render_comparison(args.float.resolve().name, lead, networks, pairs, args.against)
    write_json(args.out / "comparison.json", {"float": exact.title, **summary_of(networks, args.against)})
    values = {network.label: network.seeds[0] for network in networks}
    write_atomically(args.out / "image_distances.csv", lambda path: write_distances(path, values))
    write_atomically(args.out / "comparison.html", lambda path: path.write_text(page, encoding="utf-8"))
    print_distances(networks, console)
    for name in distances_in(networks):
        header, rows = paired_table(networks, name, args.against)
        if rows:
            say(console, f"{DISTANCES[name].title}, image by image\n{render(header, rows, 'markdown')}")
    say(console, f"{args.out / 'comparison.html'}: pairs to look at")


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
