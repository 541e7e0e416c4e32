"""Comparison of images with the float model's of the same noise, from batches as they come: few numbers of each pair are kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tfmq_exp.evaluation.features import Extractor
from tfmq_exp.evaluation.image_distances import Images, PerceptualDistance, image_distances
from tfmq_exp.evaluation.metrics import FeatureMoments, frechet_distance


@dataclass(frozen=True)
class ImageComparison:
    """Choice of distances beside PSNR, SSIM and MS-SSIM: features of pairs, and features of all images."""

    perceptual: tuple[PerceptualDistance, ...] = ()
    extract: Extractor | None = None  # for the Fréchet distance of all images to all float images
    device: str = "cpu"  # of PSNR, SSIM and MS-SSIM

    @property
    def identity(self) -> dict[str, Any]:
        """All that values depend on besides the images: plain JSON data."""
        features = {"fid": dict(self.extract.identity)} if self.extract else {}
        return {**features, **{each.name: each.identity for each in self.perceptual}}

    def __call__(self, pairs: Iterable[tuple[Images, Images]]) -> "ComparedImages":
        """Compare batches of images with batches of float ones.

        Raises:
            ValueError: shapes that differ within a pair or no images.
            NotFiniteError: a value that is not finite.
        """
        values: dict[str, list[float]] = {}
        moments = [FeatureMoments(self.extract.widths[0]) for _ in range(2)] if self.extract else []
        count = identical = 0
        for pair in pairs:
            images, exact = (each.to(self.device) for each in pair)
            found = image_distances(images, exact, self.perceptual)
            if values.keys() != found.keys() and count:
                odd = ", ".join(sorted(values.keys() ^ found.keys()))
                raise ValueError(f"images from {count} on have another size than those before: {odd} is of some alone")
            for name, distances in found.items():
                values.setdefault(name, []).extend(distances.tolist())
            if self.extract:
                for moment, batch in zip(moments, pair, strict=True):
                    moment.update(self.extract(batch).pooled)
            count, identical = count + len(images), identical + int((images == exact).flatten(1).all(1).sum())
        if not count:
            raise ValueError("there are no images to compare")
        return ComparedImages(values, identical, _distance(moments, count))


@dataclass(frozen=True)
class ComparedImages:
    """Values of every pair in the order of the images, and the Fréchet distance of the two sets."""

    values: dict[str, list[float]]
    identical: int  # pairs without any difference
    fid: float | None  # None without an extractor, or for a single image


def _distance(moments: Sequence[FeatureMoments], count: int) -> float | None:
    """FID of pooled features; that of equal images is 0 but for rounding, which may leave it a little below."""
    if not moments or count < 2:
        return None
    one, other = (moment.compute() for moment in moments)
    distance = frechet_distance(other, one, rank=count - 1)
    return max(0.0, float(torch.as_tensor(distance)))
