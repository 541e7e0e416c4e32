"""What training images are: nothing that the network is told, a class, or a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.denoisers.denoiser import ConditionEncoder
from tfmq_exp.sampling.caption_files import read_coco


class Labels(Protocol):
    """A way of finding the label of every image of a set."""

    def of(self, source: ImageDataset) -> Sequence[Any]:
        """As many as there are images; none where the network is told nothing."""
        ...


@dataclass(frozen=True)
class NoLabels:
    """The network is told nothing."""

    def of(self, source: ImageDataset) -> Sequence[Any]:
        """None."""
        return ()


def names_of(source: ImageDataset) -> Sequence[str]:
    """Paths of the images in their folder; TypeError for a set that is no folder."""
    names = getattr(source, "names", None)
    if names is None:
        raise TypeError(
            f"labels are found by the names of files; {type(source).__name__} has none, use data=image_folder"
        )
    return names


@dataclass(frozen=True)
class FolderClasses:
    """A folder for each class, as ImageNet is published: classes count from 0 in the order of the folders' names."""

    def of(self, source: ImageDataset) -> Sequence[int]:
        """ValueError for an image that is in no folder."""
        names = names_of(source)
        if bare := [name for name in names if "/" not in name]:
            raise ValueError(f"{bare[0]} lies in no folder, so its class is not known")
        folders = [name.split("/")[0] for name in names]
        number = {folder: i for i, folder in enumerate(sorted(set(folders)))}
        return [number[folder] for folder in folders]


@dataclass(frozen=True)
class CocoCaptions:
    """The first caption of every image in one of COCO's files, captions_*.json.

    Args:
        path: of that file.
    """

    path: str

    def of(self, source: ImageDataset) -> Sequence[str]:
        """ValueError for an image without a caption, or a file that is none of COCO's; see `read_coco`."""
        content = read_coco(Path(self.path))
        captions = {
            content.names[image]: caption for image, caption in content.captions.items() if image in content.names
        }
        files = [Path(name).name for name in names_of(source)]
        if lacking := [name for name in files if name not in captions]:
            raise ValueError(f"{self.path} has no caption for {len(lacking)} images, first {lacking[0]}")
        return [captions[name] for name in files]


@dataclass(frozen=True)
class ConditionDropout:
    """What the network is told about the rows of a batch.

    Args:
        encoder: of labels.
        labels: of every image; none where the network is told nothing.
    """

    encoder: ConditionEncoder
    labels: Sequence[Any]

    def __call__(
        self, rows: Int[Tensor, "batch"], told: Bool[Tensor, "batch"], device: torch.device
    ) -> dict[str, Tensor]:
        """Conditions as keyword arguments of the network: a row's own, or those of no condition.

        Raises:
            ValueError: a condition is to be dropped, and the network knows no such mode.
        """
        if not self.labels:
            return {}
        # mirror images come after all others, in the same order
        found = self.encoder([self.labels[row % len(self.labels)] for row in rows.tolist()]).to(device)
        if bool(told.all()):
            return dict(found.given)
        if not found.null:
            raise ValueError(
                "this network knows no mode without a condition: the share of dropped conditions must be 0"
            )
        return {
            name: torch.where(told.to(device).reshape(-1, *(1,) * (value.dim() - 1)), value, found.null[name])
            for name, value in found.given.items()
        }
