"""Metrics to compute (`conf/eval/`), and scores of images against a reference, from features extracted as images come."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.core.validate import COUNT, SWITCH, check_fields
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.evaluation import metrics
from tfmq_exp.evaluation.features import Extractor
from tfmq_exp.evaluation.image_distances import PerceptualDistance
from tfmq_exp.evaluation.metrics import NEIGHBOUR, SPLITS, FrechetDistance
from tfmq_exp.evaluation.references import NpzReference, ReferenceStatistics

Images = UInt8[Tensor, "batch channels height width"]
ROWS = ("index", "logits", "pooled", "clip")  # kept of every image, the last two where a metric needs them
log = logging.getLogger(__name__)


class CaptionMetric(Protocol):
    """A measure of how well images fit their captions, such as `ClipScore`."""

    @property
    def identity(self) -> Mapping[str, Any]: ...  # all that the scores depend on: plain JSON data

    def __call__(
        self, images: Images, captions: Sequence[str]
    ) -> Float[Tensor, "batch"]: ...  # for each pair, on the CPU


@dataclass(frozen=True)
class Evaluator:
    """Feature extractor, reference, and which metrics to compute beside FID, sFID and IS (`conf/eval/`)."""

    name: str  # part of every score's name, so that scores of different extractors are never confused
    extract: Extractor
    reference: ImageDataset | NpzReference  # real images, or their statistics
    kid: bool = False  # also the kernel distance, for which the pooled features of all images are kept
    precision_recall: bool = False  # also precision and recall, likewise
    clip: CaptionMetric | None = None  # also how well images fit the captions that they were made from
    # of images from the float model's, by a name; no part of these scores
    perceptual: Mapping[str, PerceptualDistance] = field(default_factory=dict)
    # of the reference for KID, precision and recall; guided-diffusion's files hold so many
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


class Scores:
    """Streaming scores: sums for FID and sFID, rows for metrics that need images one by one.

    Images have indices. What processes have computed of different images merges into the scores of all images, in any order.
    """

    def __init__(self, evaluator: Evaluator, reference: ReferenceStatistics) -> None:
        if evaluator.kept and not len(reference.manifold):
            raise ValueError("KID, precision and recall need features of the reference's images, and none were kept")
        self.evaluator, self.reference = evaluator, reference
        self.distances = {"fid": FrechetDistance(reference.pooled), "sfid": FrechetDistance(reference.spatial)}
        self.rows: list[dict[str, Tensor]] = []

    def update(self, images: Images, first: int, captions: Sequence[str] = ()) -> None:
        """Add the images with index `first`, `first + 1`, ..., and their captions if the evaluator has a caption metric."""
        shape = tuple(images.shape[1:])
        if images.dtype is not torch.uint8 or self.reference.shape not in (None, shape):
            expected, found = f"uint8 {self.reference.shape}", f"{images.dtype} {shape}"
            raise ValueError(f"the reference's images are {expected}, the generated ones {found}")
        clip = torch.zeros(0)
        if self.evaluator.clip:
            if len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f"the CLIP score needs a caption for each image, got {list(captions)[:3]}")
            clip = self.evaluator.clip(images, captions)
        features = self.evaluator.extract(images)
        pooled = features.pooled if self.evaluator.kept else features.pooled[:, :0]
        kept = (torch.arange(first, first + len(images)), features.logits, pooled.clone(), clip)
        self.rows.append(dict(zip(ROWS, kept, strict=True)))
        self.distances["fid"].update(features.pooled)
        self.distances["sfid"].update(features.spatial)

    def joined_rows(self) -> dict[str, Tensor]:
        """All rows in the order of their indices; ValueError for images that are missing or came twice."""
        rows = _joined(self.rows)
        order = rows["index"].argsort()
        rows = {name: part[order] if len(part) else part for name, part in rows.items()}
        for expected, index in enumerate(rows["index"].tolist()):
            if index != expected:
                missing = f"images {expected} to {index - 1} are missing"
                raise ValueError(f"image {index} came twice" if index < expected else missing)
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """All that another process needs for `merge`, by name."""
        sums: dict[str, Any] = {
            f"{name}.{key}": x for name, metric in self.distances.items() for key, x in metric.metric_state.items()
        }
        return sums | _joined(self.rows)

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the `tensors` of the same evaluator's scores of other images."""
        if "index" in tensors:
            self.rows.append({name: tensors[name] for name in ROWS})
        for name, metric in self.distances.items():
            metric.merge_state({key: tensors[f"{name}.{key}"] for key in metric.metric_state})

    def compute(self) -> dict[str, float]:
        """Compute `fid`, `sfid`, `kid` (lower is better), `is`, `is_adm`, `precision`, `recall`, `clip` (higher is better).

        A score that the evaluator does not ask for, or that needs more images than there are, is left out; a warning says why.

        Raises:
            ValueError: fewer than two images, some missing or twice, or a score that is not finite.
        """
        evaluator, count = self.evaluator, sum(len(part["index"]) for part in self.rows)
        if count < 2:
            raise ValueError(f"scores need at least two images, got {count}")
        rows = self.joined_rows()
        self._warn_of_few(count)
        scores = {name: float(metric.compute()) for name, metric in self.distances.items()}
        if count >= SPLITS:
            scores["is"] = metrics.inception_score(rows["logits"])
            scores["is_adm"] = metrics.inception_score_adm(rows["logits"])
        pooled = self.reference.manifold[: evaluator.kept], rows["pooled"]
        real, generated = (features.to(evaluator.extract.device) for features in pooled)
        if evaluator.kid and min(len(real), count) >= 2:
            scores["kid"] = metrics.kernel_distance(real, generated)
        if evaluator.precision_recall and min(len(real), count) > NEIGHBOUR:
            scores["precision"], scores["recall"] = metrics.precision_recall(real, generated)
        if evaluator.clip is not None:
            scores["clip"] = max(float(rows["clip"].double().mean()), 0.0)  # in this order, nan stays
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


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in ROWS} if parts else {}
