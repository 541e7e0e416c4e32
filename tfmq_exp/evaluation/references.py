"""What generated images are compared with: moments of a reference's features, computed once or read from a file."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tfmq_exp.core.files import sha256_of
from tfmq_exp.data.source import ImageSource
from tfmq_exp.evaluation.features.extractor import Extractor
from tfmq_exp.evaluation.metrics.fid import GaussianStatistics, RunningMoments
from tfmq_exp.evaluation.npz_images import NpzImages, find_images
from tfmq_exp.evaluation.reference_npz import read_statistics

ALIKE = 1e-9  # variance over squared mean, which sums in double precision leave where nothing varies


@dataclass(frozen=True)
class NpzReference:
    """Statistics in guided-diffusion's format, in a file; see `tfmq_exp.evaluation.reference_npz`.

    Args:
        path: the `.npz`.
        any_size: take a file without images, which does not say of which size they were.
    """

    path: str
    any_size: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Name and hash of the file: plain JSON data.

        Raises:
            FileNotFoundError: no such file; says where such files are published.
        """
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no reference statistics at {path}: nothing is downloaded; guided-diffusion publishes them for ImageNet "
                "and for LSUN bedroom, cat and horse (github.com/openai/guided-diffusion, folder evaluations)"
            )
        return {"file": path.name, "sha256": sha256_of(path)} | ({"any_size": True} if self.any_size else {})


@dataclass(frozen=True)
class ReferenceStatistics:
    """Everything that the scores read of a reference.

    Args:
        pooled: for FID.
        spatial: for sFID.
        manifold: pooled features of its first images, for KID, precision and recall; none where they were not asked for.
        shape: channels, height, width of the images; None where a file does not say.
        provenance: where it comes from: plain JSON data.
    """

    pooled: GaussianStatistics
    spatial: GaussianStatistics
    manifold: Float[Tensor, "images pooled"]
    shape: tuple[int, int, int] | None
    provenance: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The reference in a few words, for a table."""
        known = (self.provenance[key] for key in ("set", "database", "file") if key in self.provenance)
        size = f" of {self.shape[1]}x{self.shape[2]}" if self.shape else ""
        count = f"{self.provenance['images']} images" if "images" in self.provenance else "statistics of images"
        return ", ".join((*known, count + size))

    def save(self, path: Path) -> None:
        """Write as safetensors, with shape and provenance as JSON in its header."""
        gaussians = {"pooled": self.pooled, "spatial": self.spatial}
        tensors = {
            f"{name}.{part}": x for name, gaussian in gaussians.items() for part, x in gaussian._asdict().items()
        }
        header = {"shape": self.shape, "provenance": dict(self.provenance)}
        save_file({**tensors, "manifold": self.manifold}, path, {"header": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "ReferenceStatistics":
        """Read what `save` wrote.

        Raises:
            ValueError: a damaged file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["header"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            gaussians = [
                GaussianStatistics(tensors[f"{part}.mean"], tensors[f"{part}.covariance"])
                for part in ("pooled", "spatial")
            ]
            shape = None if header["shape"] is None else tuple(header["shape"])
            return cls(gaussians[0], gaussians[1], tensors["manifold"], shape, header["provenance"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no reference statistics: {error}") from error


def reference_statistics(
    reference: ImageSource | NpzReference, extract: Extractor, keep: int, each: Callable[[int, int], None]
) -> ReferenceStatistics:
    """The statistics of a reference, in one pass over its images.

    Args:
        reference: images, or a file of statistics.
        extract: images to features.
        keep: how many images' pooled features to keep, for KID, precision and recall: images at equal distances, since the
            first ones of a folder may all be of one class. Of a file of statistics the first, as its own evaluator does.
        each: told after every batch how many images are done, and of how many.

    Raises:
        FileNotFoundError: no such file of statistics.
        ValueError: fewer than two images, or all the same; images or statistics that are not what they should be.
    """
    if isinstance(reference, NpzReference):
        found = from_npz(reference, extract, keep, each)
    else:
        found = from_images(reference, extract, keep, each)
    for gaussian, features in ((found.pooled, "pooled"), (found.spatial, "spatial")):
        check_spread(gaussian, features, found.title)
    return found


def check_spread(gaussian: GaussianStatistics, features: str, title: str) -> None:
    """ValueError for images that are all the same, up to rounding: a distance to them says nothing of a sampler."""
    if float(gaussian.covariance.trace()) <= ALIKE * float(gaussian.mean.square().sum()):
        raise ValueError(
            f"all images of the reference ({title}) have the same {features} features: are they one image?"
        )


def from_images(
    source: ImageSource, extract: Extractor, keep: int, each: Callable[[int, int], None]
) -> ReferenceStatistics:
    """Statistics of images; their provenance has the hash of all pixels, image after image in the order C, H, W."""
    count = len(source)
    if count < 2:
        raise ValueError(f"a reference needs at least two images, got {count}")
    pooled, spatial = (RunningMoments.zeros(width) for width in extract.widths)
    kept: list[Tensor] = [torch.zeros(0, extract.widths[0])]
    pixels, done = hashlib.sha256(), 0
    wanted = torch.zeros(count, dtype=torch.bool)
    wanted[torch.arange(min(keep, count)) * count // max(1, min(keep, count))] = True
    for images in source.batches(extract.batch):
        if images.dtype is not torch.uint8 or tuple(images.shape[1:]) != source.shape:
            given = f"{images.dtype} {tuple(images.shape[1:])}"
            raise ValueError(f"the reference announces uint8 images {source.shape} and gives {given}")
        features = extract(images)
        pooled.update(features.pooled)
        spatial.update(features.spatial)
        kept.append(features.pooled[wanted[done : done + len(images)]])
        pixels.update(images.contiguous().numpy().tobytes())
        done += len(images)
        each(done, count)
    if done != count:
        raise ValueError(f"the reference announces {count} images and gives {done}")
    provenance = {**source.identity, "images": count, "pixels_sha256": pixels.hexdigest()}
    return ReferenceStatistics(pooled.gaussian(), spatial.gaussian(), torch.cat(kept), source.shape, provenance)


def from_npz(
    reference: NpzReference, extract: Extractor, keep: int, each: Callable[[int, int], None]
) -> ReferenceStatistics:
    """Statistics of a file, whose images are read only where their features are to be kept."""
    provenance, path = reference.identity, Path(reference.path)
    pooled, spatial = read_statistics(path, extract.widths)
    if find_images(path) is None:
        if not reference.any_size:
            raise ValueError(
                f"{path} holds no images (arr_0), so it does not say of which size they were; set any_size=true "
                "if you know that it is the size of the generated ones"
            )
        if keep:
            raise ValueError(f"{path} holds no images (arr_0), which KID, precision and recall need")
        return ReferenceStatistics(pooled, spatial, torch.zeros(0, extract.widths[0]), None, provenance)
    source = NpzImages(path)
    kept: list[Tensor] = [torch.zeros(0, extract.widths[0])]
    count, done = min(len(source), keep), 0
    for images in source.batches(extract.batch) if count else ():
        kept.append(extract(images[: count - done]).pooled)
        done += len(kept[-1])
        each(done, count)
        if done == count:
            break
    provenance["images_beside_statistics"] = len(source)
    return ReferenceStatistics(pooled, spatial, torch.cat(kept), source.shape, provenance)
