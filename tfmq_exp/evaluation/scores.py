"""Metrics to compute (`conf/eval/`), and scores of images against a reference, from features extracted as images come."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.core.validate import COUNT, SWITCH, check_fields
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.evaluation import metrics
from tfmq_exp.evaluation.features.extractor import Extractor
from tfmq_exp.evaluation.metrics import NEIGHBOUR, SPLITS, FrechetDistance
from tfmq_exp.evaluation.references import NpzReference, ReferenceStatistics

log = logging.getLogger(__name__)


class CaptionMetric(Protocol):
    """A measure of how well images fit their captions, such as `ClipScore`."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that the scores depend on: plain JSON data."""
        ...

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], captions: Sequence[str]
    ) -> Float[Tensor, "batch"]:
        """Score each pair of image and caption, on the CPU."""
        ...


@dataclass(frozen=True)
class Evaluator:
    """Feature extractor, reference, and which metrics to compute beside FID, sFID and IS.

    Args:
        name: part of every score's name, so that scores of different extractors are never confused.
        extract: images to features.
        reference: real images, or their statistics.
        kid: also the kernel distance, for which the pooled features of all images are kept.
        precision_recall: also precision and recall, likewise.
        clip: also how well images fit the captions that they were made from.
        manifold_images: images of the reference for KID, precision and recall; guided-diffusion's files hold 10,000.
    """

    name: str
    extract: Extractor
    reference: ImageDataset | NpzReference
    kid: bool = False
    precision_recall: bool = False
    clip: CaptionMetric | None = None
    manifold_images: int = 10_000

    def __post_init__(self) -> None:
        check_fields(self, kid=SWITCH, precision_recall=SWITCH, manifold_images=COUNT)

    @property
    def kept(self) -> int:
        """Number of reference images whose pooled features the metrics need."""
        return self.manifold_images if self.kid or self.precision_recall else 0

    @property
    def identity(self) -> dict[str, Any]:
        """All that scores depend on besides images and reference: plain JSON data."""
        return {
            **{"name": self.name, **self.extract.identity},
            **{"kid": self.kid, "precision_recall": self.precision_recall},
            **({"manifold_images": self.manifold_images} if self.kept else {}),
            **({"clip": dict(self.clip.identity)} if self.clip else {}),
        }


class ImageRows(NamedTuple):
    """Features that are kept of every image."""

    index: Int[Tensor, "images"]
    logits: Float[Tensor, "images classes"]
    pooled: Float[Tensor, "images pooled"]  # width 0 where no metric needs them
    clip: Float[Tensor, "images"]  # empty without a caption metric


class Scores:
    """Streaming scores: sums for FID and sFID, rows for metrics that need images one by one.

    Images have indices. What processes have computed of different images merges into the scores of all images, in any order.
    """

    def __init__(self, evaluator: Evaluator, reference: ReferenceStatistics) -> None:
        if evaluator.kept and not len(reference.manifold):
            raise ValueError("KID, precision and recall need features of the reference's images, and none were kept")
        self.evaluator, self.reference = evaluator, reference
        self.distances = {"fid": FrechetDistance(reference.pooled), "sfid": FrechetDistance(reference.spatial)}
        self.rows: list[ImageRows] = []

    def update(
        self, images: UInt8[Tensor, "batch channels height width"], first: int, captions: Sequence[str] = ()
    ) -> None:
        """Add generated images.

        Args:
            images: images `first`, `first + 1`, ...
            first: index among all.
            captions: what they were made from, where the evaluator has a caption metric.
        """
        shape = tuple(images.shape[1:])
        if images.dtype is not torch.uint8 or self.reference.shape not in (None, shape):
            expected = f"uint8 {self.reference.shape}"
            raise ValueError(f"the reference's images are {expected}, the generated ones {images.dtype} {shape}")
        clip = torch.zeros(0)
        if self.evaluator.clip is not None:
            if len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f"the CLIP score needs a caption for each image, got {list(captions)[:3]}")
            clip = self.evaluator.clip(images, captions)
        features = self.evaluator.extract(images)
        pooled = features.pooled if self.evaluator.kept else features.pooled[:, :0]
        self.rows.append(ImageRows(torch.arange(first, first + len(images)), features.logits, pooled.clone(), clip))
        self.distances["fid"].update(features.pooled)
        self.distances["sfid"].update(features.spatial)

    def joined_rows(self) -> ImageRows:
        """All rows in the order of their indices; ValueError for images that are missing or came twice."""
        if not self.rows:
            raise ValueError("scores need at least two images, got 0")
        rows = _concatenated(self.rows)
        order = rows.index.argsort()
        rows = ImageRows(*(part[order] if len(part) else part for part in rows))
        for expected, index in enumerate(rows.index.tolist()):
            if index < expected:
                raise ValueError(f"image {index} came twice")
            if index > expected:
                raise ValueError(f"images {expected} to {index - 1} are missing")
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """All that another process needs for `merge`, by name."""
        tensors: dict[str, Any] = {
            f"{name}.{key}": x for name, metric in self.distances.items() for key, x in metric.metric_state.items()
        }
        if self.rows:
            tensors |= {f"rows.{name}": x for name, x in _concatenated(self.rows)._asdict().items()}
        return tensors

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the `tensors` of the same evaluator's scores of other images."""
        if "rows.index" in tensors:
            self.rows.append(ImageRows(*(tensors[f"rows.{name}"] for name in ImageRows._fields)))
        for name, metric in self.distances.items():
            metric.merge_state({key: tensors[f"{name}.{key}"] for key in metric.metric_state})

    def compute(self) -> dict[str, float]:
        """Compute `fid`, `sfid`, `kid` (lower is better), `is`, `is_adm`, `precision`, `recall`, `clip` (higher is better).

        KID, precision, recall and CLIP where the evaluator has them. A score that needs more images than there are is
        left out, and a warning says why.

        Raises:
            ValueError: fewer than two images, some missing or twice, or a score that is not finite.
        """
        rows, evaluator = self.joined_rows(), self.evaluator
        count, device = len(rows.index), evaluator.extract.device
        if count < 2:
            raise ValueError(f"scores need at least two images, got {count}")
        self._warn_of_few(count)
        scores = {name: float(metric.compute()) for name, metric in self.distances.items()}
        if count >= SPLITS:
            scores |= {"is": metrics.inception_score(rows.logits), "is_adm": metrics.inception_score_adm(rows.logits)}
        real, generated = self.reference.manifold[: evaluator.kept].to(device), rows.pooled.to(device)
        if evaluator.kid and min(len(real), count) >= 2:
            scores["kid"] = metrics.kernel_distance(real, generated)
        if evaluator.precision_recall and min(len(real), count) > NEIGHBOUR:
            scores["precision"], scores["recall"] = metrics.precision_recall(real, generated)
        if evaluator.clip is not None:
            scores["clip"] = max(float(rows.clip.double().mean()), 0.0)  # in this order, nan stays
        for name, value in scores.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"{evaluator.name}: the score {name} of {count} images is {value}")
        return scores

    def _warn_of_few(self, count: int) -> None:
        """A covariance of too few images is singular, and the distance is biased by their number."""
        name, (pooled, spatial) = self.evaluator.name, self.evaluator.extract.widths
        for kind, images in (("generated", count), ("reference", self.reference.provenance.get("images", math.inf))):
            if images <= max(pooled, spatial):
                log.warning(
                    f"{name}: {images} {kind} images for {pooled} pooled and {spatial} spatial features: their covariance is "
                    "singular, and FID and sFID compare only with those of as many images"
                )
        if count < SPLITS:
            log.warning(f"{name}: no Inception scores, which need {SPLITS} images; there are {count}")
        elif count < SPLITS**2:
            log.warning(f"{name}: an Inception score over parts of {count // SPLITS} images is at most that number")
        if self.evaluator.kept and (few := min(count, len(self.reference.manifold))) <= NEIGHBOUR:
            log.warning(f"{name}: {few} images are too few for precision and recall{' or KID' if few < 2 else ''}")


def _concatenated(parts: Sequence[ImageRows]) -> ImageRows:
    return ImageRows(*map(torch.cat, zip(*parts, strict=True)))
