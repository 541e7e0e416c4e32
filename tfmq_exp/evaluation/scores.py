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
ROWS = ("index", "logits", "pooled")  # kept of every image, the last where a metric needs them; and its own scores
# names that scores of single images may not have
TAKEN = {*ROWS, "fid", "sfid", "is", "is_adm", "kid", "cmmd", "precision", "recall"}
log = logging.getLogger(__name__)


class ImageScore(Protocol):
    """A score of a single image, such as `ClipScore`: how well it fits its caption, or how good it looks."""

    @property
    def identity(self) -> Mapping[str, Any]: ...  # all that the scores depend on: plain JSON data

    @property
    def needs_captions(self) -> bool: ...

    def __call__(
        self, images: Images, captions: Sequence[str]
    ) -> Float[Tensor, "batch"]: ...  # higher is better; on the CPU


@dataclass(frozen=True)
class Evaluator:
    """Feature extractor, reference, and which metrics to compute beside FID, sFID and IS (`conf/eval/`)."""

    name: str  # part of every score's name, so that scores of different extractors are never confused
    extract: Extractor
    reference: ImageDataset | NpzReference  # real images, or their statistics
    kid: bool = False  # also the kernel distance, for which the pooled features of all images are kept
    precision_recall: bool = False  # also precision and recall, likewise
    cmmd: bool = False  # also CMMD, likewise; it is defined for CLIP's embeddings
    # scores of every single image by name; their means are scores of the network
    image_scores: Mapping[str, ImageScore] = field(default_factory=dict)
    # distances of images from the float model's, by a name; no part of these scores
    perceptual: Mapping[str, PerceptualDistance] = field(default_factory=dict)
    # of the reference for KID, CMMD, precision and recall; guided-diffusion's files hold so many
    manifold_images: int = 10_000

    def __post_init__(self) -> None:
        check_fields(self, kid=SWITCH, precision_recall=SWITCH, cmmd=SWITCH, manifold_images=COUNT)
        if wrong := sorted(self.image_scores.keys() & TAKEN):
            raise ValueError(
                f"image_scores.{wrong[0]}: a score of single images may not be called {', '.join(sorted(TAKEN))}"
            )

    @property
    def kept(self) -> int:
        """Number of reference images whose pooled features the metrics need."""
        return self.manifold_images if self.kid or self.precision_recall or self.cmmd else 0

    @property
    def identity(self) -> dict[str, Any]:
        """All that scores depend on besides images and reference: plain JSON data."""
        return {
            **{"name": self.name, **self.extract.identity},
            **{"kid": self.kid, "precision_recall": self.precision_recall},
            **({"cmmd": True} if self.cmmd else {}),
            **({"manifold_images": self.manifold_images} if self.kept else {}),
            **({"image_scores": scores} if (scores := _identities(self.image_scores)) else {}),
        }


class Scores:
    """Streaming scores: sums for FID and sFID, rows for metrics that need images one by one.

    Images have indices. What processes have computed of different images merges into the scores of all images, in any order.
    """

    def __init__(self, evaluator: Evaluator, reference: ReferenceStatistics) -> None:
        if evaluator.kept and not len(reference.manifold):
            raise ValueError(
                "KID, CMMD, precision and recall need features of the reference's images, and none were kept"
            )
        self.evaluator, self.reference = evaluator, reference
        parts = {"fid": reference.pooled, "sfid": reference.spatial}  # the latter has no features in some extractors
        self.distances = {name: FrechetDistance(part) for name, part in parts.items() if len(part.mean)}
        self.rows: list[dict[str, Tensor]] = []

    def update(self, images: Images, first: int, captions: Sequence[str] = ()) -> None:
        """Add the images with index `first`, `first + 1`, ..., and their captions if the evaluator scores how images fit them."""
        shape = tuple(images.shape[1:])
        if images.dtype is not torch.uint8 or self.reference.shape not in (None, shape):
            expected, found = f"uint8 {self.reference.shape}", f"{images.dtype} {shape}"
            raise ValueError(f"the reference's images are {expected}, the generated ones {found}")
        needing = [name for name, metric in self.evaluator.image_scores.items() if metric.needs_captions]
        complete = len(captions) == len(images) and all(isinstance(caption, str) for caption in captions)
        if needing and not complete:
            raise ValueError(f"the score {needing[0]} needs a caption for each image, got {list(captions)[:3]}")
        single = {name: metric(images, captions) for name, metric in self.evaluator.image_scores.items()}
        features = self.evaluator.extract(images)
        pooled = features.pooled if self.evaluator.kept else features.pooled[:, :0]
        kept = (torch.arange(first, first + len(images)), features.logits, pooled.clone())
        self.rows.append(dict(zip(ROWS, kept, strict=True)) | single)
        for name, metric in self.distances.items():
            metric.update(features.pooled if name == "fid" else features.spatial)

    def joined_rows(self) -> dict[str, Tensor]:
        """All rows in the order of their indices; ValueError for images that are missing or came twice."""
        rows = _joined(self.rows)
        order = rows["index"].argsort()
        rows = {name: part[order] for name, part in rows.items()}
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
            self.rows.append({name: tensors[name] for name in (*ROWS, *self.evaluator.image_scores)})
        for name, metric in self.distances.items():
            metric.merge_state({key: tensors[f"{name}.{key}"] for key in metric.metric_state})

    def compute(self) -> dict[str, float]:
        """Compute `fid`, `sfid`, `kid`, `cmmd` (lower is better), `is`, `is_adm`, `precision`, `recall`, and means of single images.

        These have the names of `Evaluator.image_scores`, and higher is better. A score that the evaluator does not ask for, or
        that needs more images than there are, is left out; a warning says why.

        Raises:
            ValueError: fewer than two images, some missing or twice, or a score that is not finite.
        """
        evaluator, count = self.evaluator, sum(len(part["index"]) for part in self.rows)
        if count < 2:
            raise ValueError(f"scores need at least two images, got {count}")
        rows = self.joined_rows()
        self._warn_of_few(count)
        scores = {name: float(metric.compute()) for name, metric in self.distances.items()}
        if count >= SPLITS and rows["logits"].shape[1]:
            scores["is"] = metrics.inception_score(rows["logits"])
            scores["is_adm"] = metrics.inception_score_adm(rows["logits"])
        pooled = self.reference.manifold[: evaluator.kept], rows["pooled"]
        real, generated = (features.to(evaluator.extract.device) for features in pooled)
        if evaluator.kid and min(len(real), count) >= 2:
            scores["kid"] = metrics.kernel_distance(real, generated)
        if evaluator.cmmd and len(real):
            scores["cmmd"] = metrics.maximum_mean_discrepancy(real, generated)
        if evaluator.precision_recall and min(len(real), count) > NEIGHBOUR:
            scores["precision"], scores["recall"] = metrics.precision_recall(real, generated)
        scores |= {name: float(rows[name].double().mean()) for name in evaluator.image_scores}
        for name, value in scores.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"{evaluator.name}: the score {name} of {count} images is {value}")
        return scores

    def image_rows(self) -> dict[str, Tensor]:
        """The scores of every single image in the order of their indices, by name, for paired comparisons; float32."""
        rows = self.joined_rows()
        return {name: rows[name].float() for name in self.evaluator.image_scores}

    def _warn_of_few(self, count: int) -> None:
        """A covariance of too few images is singular, and the distance is biased by their number."""
        name, (pooled, spatial) = self.evaluator.name, self.evaluator.extract.widths
        widths = f"{pooled} pooled and {spatial} spatial features" if spatial else f"{pooled} features"
        for kind, images in (("generated", count), ("reference", self.reference.provenance.get("images", math.inf))):
            if images <= max(pooled, spatial):
                log.warning(
                    f"{name}: {images} {kind} images for {widths}: their covariance is singular, and FID and sFID compare "
                    "only with those of as many images"
                )
        if count < SPLITS:
            log.warning(f"{name}: no Inception scores, which need {SPLITS} images; there are {count}")
        elif count < SPLITS**2:
            log.warning(f"{name}: an Inception score over parts of {count // SPLITS} images is at most that number")
        if self.evaluator.kept and (few := min(count, len(self.reference.manifold))) <= NEIGHBOUR:
            log.warning(f"{name}: {few} images are too few for precision and recall{' or KID' if few < 2 else ''}")


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _identities(scores: Mapping[str, ImageScore]) -> dict[str, dict[str, Any]]:
    return {name: dict(score.identity) for name, score in scores.items()}
