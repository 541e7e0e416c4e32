"""Sets of images that are compared pair by pair: folders of files, `.npz` files, and whatever comes in batches."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.data.decoding import in_order, to_rgb
from tfmq_exp.data.folder import find_images
from tfmq_exp.evaluation.image_distances import Images
from tfmq_exp.evaluation.npz import NpzImages

Image = UInt8[Tensor, "channels height width"]
BATCH_VALUES = 2**22  # values of the images that are compared together: 21 images of 256x256


class ImageSource(Protocol):
    """Images with names, in a fixed order."""

    @property
    def title(self) -> str: ...  # of the whole set

    @property
    def names(self) -> Sequence[str] | None: ...  # None where images have indices alone

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Images by their indices, in this order."""
        ...


class FolderImages:
    """Image files below a folder, in the order of their paths; their names are these without the suffix.

    Raises:
        ValueError: no images, or two with the same name.
        FileNotFoundError: links that lead nowhere.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.title = root, str(root)
        self.files, _ = find_images(root)
        self.names = [str(PurePosixPath(file).with_suffix("")) for file in self.files]
        if not self.files:
            raise ValueError(f"no images in {root}")
        if twice := [name for name, files in Counter(self.names).items() if files > 1]:
            raise ValueError(f"{root} has several images of the name {twice[0]}: which one is compared?")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        def decoded(i: int) -> UInt8[np.ndarray, "height width 3"]:
            path = self.root / self.files[i]
            return np.asarray(to_rgb(str(path), path.read_bytes()))

        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1) for pixels in in_order(decoded, indices))


@dataclass(frozen=True)
class BatchedImages:
    """Images that come in batches, in order, such as those of a run; they have no names."""

    title: str
    count: int
    batches: Callable[[], Iterable[Images]]
    names: None = None

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Images by rising indices; those between them are read as well."""
        remaining, first = iter(indices), 0
        index = next(remaining, None)
        for batch in self.batches():
            while index is not None and index < first + len(batch):
                yield batch[index - first]
                index = next(remaining, None)
            first += len(batch)
            if index is None:
                return
        raise ValueError(f"{self.title} ends before image {index}")


def npz_source(path: Path) -> BatchedImages:
    """Images of `arr_0`."""
    images = NpzImages(path)
    return BatchedImages(str(path), len(images), lambda: images.batches(16))


def matching_indices(exact: ImageSource, other: ImageSource) -> list[int]:
    """Index in `other` for every image of `exact`: by name where both have names, else by index.

    Raises:
        ValueError: other numbers or names, with the first that are in one alone.
    """
    if exact.names is not None and other.names is not None:
        places = {name: i for i, name in enumerate(other.names)}
        missing, extra = sorted(set(exact.names) - places.keys()), sorted(places.keys() - set(exact.names))
        alone = [(source.title, names) for source, names in ((exact, missing), (other, extra)) if names]
        parts = [f"{len(names)} are in {title} alone, such as {', '.join(names[:3])}" for title, names in alone]
        if parts:
            raise ValueError(f"images are matched by name, and {'; '.join(parts)}")
        return [places[name] for name in exact.names]
    if len(exact) != len(other):
        counts = f"{exact.title} has {len(exact)}, {other.title} has {len(other)}"
        raise ValueError(f"images without names are matched by index, and their numbers differ: {counts}")
    return list(range(len(exact)))


def read_pairs(
    exact: ImageSource, other: ImageSource, indices: Sequence[int], matching: Sequence[int]
) -> Iterator[tuple[Image, Image]]:
    """Images of `other` and `exact` with these rising indices of the latter; gray ones as three channels beside coloured ones.

    Raises:
        ValueError: a pair of two sizes, by its name.
    """
    both = zip(indices, exact.read(indices), other.read([matching[i] for i in indices]), strict=True)
    for i, first, second in both:
        if first.shape[1:] != second.shape[1:]:
            name = exact.names[i] if exact.names else f"image {i}"
            sizes = [f"{s.shape[2]}x{s.shape[1]} in {t.title}" for s, t in ((first, exact), (second, other))]
            raise ValueError(f"{name} is {' and '.join(sizes)}: pairs have one size")
        channels = max(len(first), len(second))
        yield second.expand(channels, -1, -1), first.expand(channels, -1, -1)


def batched_pairs(pairs: Iterable[tuple[Image, Image]]) -> Iterator[tuple[Images, Images]]:
    """Consecutive pairs of one shape in batches of a bounded size."""
    for shape, same in groupby(pairs, lambda pair: pair[0].shape):
        size, batch = max(1, BATCH_VALUES // shape.numel()), list[tuple[Image, Image]]()
        for pair in same:
            batch.append(pair)
            if len(batch) == size:
                yield _stacked(batch)
                batch = []
        if batch:
            yield _stacked(batch)


def _stacked(pairs: Sequence[tuple[Image, Image]]) -> tuple[Images, Images]:
    images, exact = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(exact)
