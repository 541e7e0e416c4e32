"""Images of MJHQ-30K (arXiv 2402.17245), all or those of a subset of its prompts."""

from pathlib import Path

from tfmq_exp.data.folder import ImageFolder
from tfmq_exp.data.preparation import Preparation
from tfmq_exp.data.prompt_files import Choice, choose_names, read_metadata

ORIGIN = "mjhq30k_imgs.zip, unpacked, beside meta_data.json, both of huggingface.co/datasets/playgroundai/MJHQ-30K"


def mjhq_images(
    path: str, size: int, preparation: Preparation, count: int | None = None, choice: Choice = "shuffled"
) -> ImageFolder:
    """The images whose prompts `choose_names` takes, in that order.

    Args:
        path: folder of `meta_data.json` and of the images, `CATEGORY/NAME.jpg`, bare or in `mjhq30k_imgs`.
        size: pixels of a side after preparation.
        preparation: makes an image a square.
        count: of images; None for all 30,000.
        choice: see `choose_names`.
    """
    root = Path(path)
    metadata = root / "meta_data.json"
    if not metadata.is_file():
        raise FileNotFoundError(f"no {metadata}: nothing is downloaded; expected in {path}: {ORIGIN}")
    records = read_metadata(metadata)
    names = [f"{records[name]['category']}/{name}.jpg" for name in choose_names(list(records), count, choice)]
    images = root / "mjhq30k_imgs"
    return ImageFolder(str(images if images.is_dir() else root), size, preparation, names, ORIGIN)
