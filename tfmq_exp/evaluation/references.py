"""Reference statistics: moments of real images' features, computed once or read from a file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.files import sha256_of
from tfmq_exp.core.tensor_file import read_tensor_file, write_tensor_file
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.denoisers.emoji import emoji_folder
from tfmq_exp.evaluation.features import Extractor
from tfmq_exp.evaluation.metrics import FeatureMoments, GaussianStatistics
from tfmq_exp.evaluation.npz import NpzImages, has_images, read_statistics

PARTS = ("pooled", "spatial")
ALIKE = 1e-9  # variance over squared mean, which sums in double precision leave where nothing varies
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NpzReference:
    """Statistics in guided-diffusion's format, in a `.npz` file."""

    path: str
    any_size: bool = False  # take a file without images, which does not say of which size they were

    @property
    def identity(self) -> dict[str, Any]:
        """Name and hash of the file: plain JSON data."""
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no reference statistics at {path}: nothing is downloaded; guided-diffusion publishes them for ImageNet "
                "and for LSUN bedroom, cat and horse (github.com/openai/guided-diffusion, folder evaluations)"
            )
        return {"file": path.name, "sha256": sha256_of(path)} | ({"any_size": True} if self.any_size else {})


def emoji_reference(folder: str | None = None) -> NpzReference:
    """Statistics of Noto Emoji's pictures in the folder of their text-to-image model, by the features of `emoji_extractor`."""
    return NpzReference(str(emoji_folder(folder) / "reference.npz"), any_size=True)


@dataclass(frozen=True)
class ReferenceStatistics:
    """All that scores need of a reference."""

    pooled: GaussianStatistics  # for FID
    spatial: GaussianStatistics  # for sFID
    manifold: Float[Tensor, "images pooled"]  # of some images, for KID, CMMD, precision and recall; else no rows
    shape: tuple[int, int, int] | None  # channels, height, width; None where a file does not say
    provenance: Mapping[str, Any]  # identity of the images or the file: plain JSON data

    @property
    def title(self) -> str:
        """A short description for tables."""
        names = (self.provenance[key] for key in ("set", "database", "file") if key in self.provenance)
        size = f" of {self.shape[1]}x{self.shape[2]}" if self.shape else ""
        count = f"{self.provenance['images']} images" if "images" in self.provenance else "statistics of images"
        return ", ".join((*names, count + size))

    def save(self, path: Path) -> None:
        """Write as safetensors, with shape and provenance as JSON in its header."""
        tensors = {f"{part}.{name}": x for part in PARTS for name, x in getattr(self, part)._asdict().items()}
        header = {"shape": self.shape, "provenance": dict(self.provenance)}
        write_tensor_file(path, {**tensors, "manifold": self.manifold}, header)

    @classmethod
    def load(cls, path: Path) -> "ReferenceStatistics":
        """Read what `save` wrote; ValueError for a damaged file."""
        header, tensors = read_tensor_file(path)
        pooled, spatial = (
            GaussianStatistics(*(tensors[f"{part}.{name}"] for name in GaussianStatistics._fields)) for part in PARTS
        )
        shape = header["shape"] and tuple(header["shape"])
        return cls(pooled, spatial, tensors["manifold"], shape, header["provenance"])


def reference_statistics(
    reference: ImageDataset | NpzReference, extract: Extractor, keep: int, progress: Progress
) -> ReferenceStatistics:
    """Compute the statistics of images in one pass, or read them from a file; ValueError for what cannot be a reference.

    The pooled features of `keep` images are kept, for KID, CMMD, precision and recall: evenly spaced images, since the first ones of
    a folder may all be of one class; of a file of statistics the first, as its own evaluator does. `progress` is called after
    every batch with the number of images that are done, and of all.
    """
    given = extract, keep, progress
    statistics = (
        _from_npz(reference, *given) if isinstance(reference, NpzReference) else _from_images(reference, *given)
    )
    for part in PARTS:
        mean, covariance = getattr(statistics, part)
        if len(mean) and float(covariance.trace()) <= ALIKE * float(mean.square().sum()):
            raise ValueError(
                f"all images of the reference ({statistics.title}) have the same {part} features: are they one image?"
            )
    return statistics


def _from_images(dataset: ImageDataset, extract: Extractor, keep: int, progress: Progress) -> ReferenceStatistics:
    """Provenance has the hash of all pixels, image after image in the order C, H, W."""
    count = len(dataset)
    if count < 2:
        raise ValueError(f"a reference needs at least two images, got {count}")
    pooled, spatial = (FeatureMoments(width) for width in extract.widths)
    keep = min(keep, count)
    is_kept = torch.zeros(count, dtype=torch.bool)
    is_kept[torch.arange(keep) * count // max(1, keep)] = True
    kept: list[Tensor] = []
    pixels, done = hashlib.sha256(), 0
    for images in dataset.batches(extract.batch_size):
        if images.dtype is not torch.uint8 or tuple(images.shape[1:]) != dataset.shape:
            found = f"{images.dtype} {tuple(images.shape[1:])}"
            raise ValueError(f"the reference announces uint8 images {dataset.shape} and gives {found}")
        features = extract(images)
        pooled.update(features.pooled)
        spatial.update(features.spatial)
        kept.append(features.pooled[is_kept[done : done + len(images)]])
        pixels.update(images.contiguous().numpy().tobytes())
        done += len(images)
        progress(done, count)
    if done != count:
        raise ValueError(f"the reference announces {count} images and gives {done}")
    provenance = {**dataset.identity, "images": count, "pixels_sha256": pixels.hexdigest()}
    return ReferenceStatistics(pooled.compute(), spatial.compute(), torch.cat(kept), dataset.shape, provenance)


def _from_npz(reference: NpzReference, extract: Extractor, keep: int, progress: Progress) -> ReferenceStatistics:
    """Images of the file are read only where their features are to be kept."""
    provenance, path = reference.identity, Path(reference.path)
    statistics = read_statistics(path, extract.widths)
    kept = [torch.zeros(0, extract.widths[0])]
    if not has_images(path):
        if not reference.any_size:
            raise ValueError(
                f"{path} holds no images (arr_0), so it does not say of which size they were; set any_size=true "
                "if you know that it is the size of the generated ones"
            )
        if keep:
            raise ValueError(f"{path} holds no images (arr_0), which KID, CMMD, precision and recall need")
        return ReferenceStatistics(*statistics, kept[0], None, provenance)
    dataset = NpzImages(path)
    provenance["images_beside_statistics"] = len(dataset)
    count, done = min(len(dataset), keep), 0
    batches = dataset.batches(extract.batch_size)
    while done < count:
        kept.append(extract(next(batches)[: count - done]).pooled)
        done += len(kept[-1])
        progress(done, count)
    return ReferenceStatistics(*statistics, torch.cat(kept), dataset.shape, provenance)
