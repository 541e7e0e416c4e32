"""Labels of training images (classes or captions), and the conditions of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.denoisers.denoiser import ConditionEncoder, nested
from tfmq_exp.sampling.conditioning import read_coco


class Labels(Protocol):
    """Finds the label of every image of a set."""

    def of(self, source: ImageDataset) -> Sequence[Any]:
        """One per image."""
        ...


def names_of(source: ImageDataset) -> Sequence[str]:
    """Paths of the images in their folder; TypeError for a set that is no folder."""
    if (names := getattr(source, "names", None)) is None:
        kind = type(source).__name__
        raise TypeError(f"labels are found by the names of files; {kind} has none, use data=image_folder")
    return names


@dataclass(frozen=True)
class FolderClasses:
    """A folder for each class, as ImageNet is published: classes count from 0 in the order of the folders' names."""

    def of(self, source: ImageDataset) -> Sequence[int]:
        names = names_of(source)
        if bare := [name for name in names if "/" not in name]:
            raise ValueError(f"{bare[0]} lies in no folder, so its class is not known")
        folders = [name.split("/")[0] for name in names]
        number = {folder: i for i, folder in enumerate(sorted(set(folders)))}
        return [number[folder] for folder in folders]


@dataclass(frozen=True)
class OwnClasses:
    """The classes that a set of images has of its own, as the digits."""

    def of(self, source: ImageDataset) -> Sequence[int]:
        if (classes := getattr(source, "classes", None)) is None:
            raise TypeError(
                f"{type(source).__name__} knows no classes of its images: choose other method.weights.labels"
            )
        return classes


@dataclass(frozen=True)
class CocoCaptions:
    """The first caption of every image in one of COCO's files, captions_*.json, see `read_coco`."""

    path: str

    def of(self, source: ImageDataset) -> Sequence[str]:
        content = read_coco(Path(self.path))
        captions = {content.names[i]: caption for i, caption in content.captions.items() if i in content.names}
        files = [Path(name).name for name in names_of(source)]
        if lacking := [name for name in files if name not in captions]:
            raise ValueError(f"{self.path} has no caption for {len(lacking)} images, first {lacking[0]}")
        return [captions[name] for name in files]


@dataclass(frozen=True)
class ConditionDropout:
    """Conditions of a batch, of which some are dropped for classifier-free guidance (arXiv 2207.12598, algorithm 1).

    There are no labels for unconditional networks.
    """

    encoder: ConditionEncoder
    labels: Sequence[Any]

    def __call__(
        self, rows: Int[Tensor, "batch"], conditioned: Bool[Tensor, "batch"], device: torch.device
    ) -> dict[str, Any]:
        """Keyword arguments of the network: the condition of each image of `rows`, or the null condition.

        Raises:
            ValueError: a condition is to be dropped, and the network has no unconditional mode.
        """
        if not self.labels:
            return {}
        # mirror images come after all others, in the same order
        found = self.encoder([self.labels[row % len(self.labels)] for row in rows.tolist()]).to(device)
        if bool(conditioned.all()):
            return nested({**found.given, **found.constants})
        if not found.null:
            raise ValueError("this network has no unconditional mode: condition_dropout must be 0")
        mask = conditioned.to(device)
        kept = {
            name: torch.where(mask.reshape(-1, *(1,) * (value.dim() - 1)), value, found.null[name])
            for name, value in found.given.items()
        }
        return nested({**kept, **found.constants})
