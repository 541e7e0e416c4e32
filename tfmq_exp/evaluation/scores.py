"""Scores of generated images against a reference, from features that are extracted once, as images come."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.evaluation.evaluator import Evaluator
from tfmq_exp.evaluation.metrics.fid import RunningMoments, frechet_distance
from tfmq_exp.evaluation.metrics.inception_score import SPLITS, inception_score, inception_score_adm
from tfmq_exp.evaluation.metrics.kid_prdc import NEIGHBOUR, kernel_distance, precision_recall
from tfmq_exp.evaluation.references import ReferenceStatistics

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """What is kept of images one by one."""

    logits: Float[Tensor, "images classes"]
    pooled: Float[Tensor, "images pooled"]  # width 0 where only moments are asked for
    clip: Float[Tensor, "images"]  # empty where there is no judge of captions


class Scores:
    """Streaming scores: moments for the two Fréchet distances, rows for what needs images one by one.

    Images have indices; what processes have gathered from different images merges into what one would have gathered from
    all of them, whatever came first.

    Raises:
        ValueError: a reference without the features that the evaluator's scores need.
    """

    def __init__(self, evaluator: Evaluator, reference: ReferenceStatistics) -> None:
        if evaluator.kept and not len(reference.manifold):
            raise ValueError("KID, precision and recall need features of the reference's images, and none were kept")
        self.evaluator, self.reference = evaluator, reference
        self.pooled, self.spatial = (RunningMoments.zeros(width) for width in evaluator.extract.widths)
        self.rows: dict[int, Rows] = {}  # by the index of the first image

    def update(
        self, images: UInt8[Tensor, "batch channels height width"], first: int, captions: Sequence[str] = ()
    ) -> None:
        """Take generated images into account.

        Args:
            images: images `first`, `first + 1`, ...
            first: index among all.
            captions: what they were made from, where the evaluator has a judge for that.

        Raises:
            ValueError: images of another kind or size than the reference's, or captions of other images.
        """
        shape = tuple(images.shape[1:])
        if images.dtype is not torch.uint8 or self.reference.shape not in (None, shape):
            wanted = f"uint8 {self.reference.shape}"
            raise ValueError(f"the reference's images are {wanted}, the generated ones {images.dtype} {shape}")
        clip = torch.zeros(0)
        if self.evaluator.clip is not None:
            if len(captions) != len(images) or not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f"the CLIP score needs a caption for each image, got {list(captions)[:3]}")
            clip = self.evaluator.clip(images, captions)
        features = self.evaluator.extract(images)
        kept = features.pooled if self.evaluator.kept else features.pooled[:, :0]
        self._put(first, Rows(features.logits, kept.clone(), clip))
        self.pooled.update(features.pooled)
        self.spatial.update(features.spatial)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was gathered, by name: what another process needs in order to merge it."""
        moments = {"pooled": self.pooled, "spatial": self.spatial}
        named = {f"{name}.{part}": x for name, sums in moments.items() for part, x in sums.tensors().items()}
        rows = {f"rows.{first}.{part}": x for first, kept in self.rows.items() for part, x in kept._asdict().items()}
        return named | rows

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Take into account what the same evaluator has gathered from other images, in this process or another.

        Raises:
            ValueError: an image that is in both.
        """
        for first in sorted({int(name.split(".")[1]) for name in tensors if name.startswith("rows.")}):
            self._put(first, Rows(*(tensors[f"rows.{first}.{part}"] for part in Rows._fields)))
        for name, sums in (("pooled", self.pooled), ("spatial", self.spatial)):
            sums.merge(RunningMoments.of({part: tensors[f"{name}.{part}"] for part in sums.tensors()}))

    def _put(self, first: int, rows: Rows) -> None:
        for start, there in self.rows.items():
            if first < start + len(there.logits) and start < first + len(rows.logits):
                raise ValueError(f"image {max(first, start)} came twice")
        self.rows[first] = rows

    def gathered(self) -> Rows:
        """The rows in the order of their indices.

        Raises:
            ValueError: no images, or some are missing between others.
        """
        expected = min(self.rows, default=0)
        for first in sorted(self.rows):
            if first != expected:
                raise ValueError(f"images {expected} to {first - 1} are missing")
            expected += len(self.rows[first].logits)
        parts = [self.rows[first] for first in sorted(self.rows)]
        if not parts:
            raise ValueError("scores need at least two images, got 0")
        return Rows(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def compute(self) -> dict[str, float]:
        """Lower is better for `fid`, `sfid`, `kid`; higher for `is`, `is_adm`, `precision`, `recall`, `clip`.

        The last five are there where the evaluator asks for them. A score that needs more images than there are is left out,
        and a warning says why.

        Raises:
            ValueError: fewer than two images, some are missing, or a score that is not finite.
        """
        rows = self.gathered()
        count, device = len(rows.logits), self.evaluator.extract.device
        if count < 2:
            raise ValueError(f"scores need at least two images, got {count}")
        self._warn_of_few(count)
        scores = {
            "fid": frechet_distance(self.reference.pooled, self.pooled.gaussian(), count - 1),
            "sfid": frechet_distance(self.reference.spatial, self.spatial.gaussian(), count - 1),
        }
        real, generated = self.reference.manifold[: self.evaluator.kept].to(device), rows.pooled.to(device)
        if count >= SPLITS:
            scores |= {"is": inception_score(rows.logits), "is_adm": inception_score_adm(rows.logits)}
        few = min(len(real), count)
        if self.evaluator.kid and few >= 2:
            scores["kid"] = kernel_distance(real, generated)
        if self.evaluator.precision_recall and few > NEIGHBOUR:
            scores["precision"], scores["recall"] = precision_recall(real, generated)
        if self.evaluator.clip is not None:
            scores["clip"] = max(float(rows.clip.double().mean()), 0.0)  # in this order, nan stays
        for name, value in scores.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"{self.evaluator.name}: the score {name} of {count} images is {value}")
        return scores

    def _warn_of_few(self, count: int) -> None:
        """A covariance of too few images is singular, and the distance is biased by their number."""
        name, widths = self.evaluator.name, self.evaluator.extract.widths
        for what, images in (("generated", count), ("reference", self.reference.provenance.get("images", math.inf))):
            if images <= max(widths):
                log.warning(
                    "%s: %d %s images for %d pooled and %d spatial features: their covariance is singular, and FID and "
                    "sFID compare only with those of as many images",
                    *(name, images, what, *widths),
                )
        if count < SPLITS:
            log.warning("%s: no Inception scores, which need %d images; there are %d", name, SPLITS, count)
        elif count < SPLITS**2:
            log.warning("%s: an Inception score over parts of %d images is at most that number", name, count // SPLITS)
        if self.evaluator.kept and (few := min(count, len(self.reference.manifold))) <= NEIGHBOUR:
            log.warning("%s: %d images are too few for precision and recall%s", name, few, " or KID" if few < 2 else "")


def score(
    evaluator: Evaluator,
    reference: ReferenceStatistics,
    shards: Iterable[UInt8[Tensor, "batch channels height width"]],
    captions: Callable[[range], Sequence[str]] = lambda _: (),
) -> dict[str, float]:
    """Scores of images that come in shards, in the order of their indices, made from the captions of these indices."""
    scores, count = Scores(evaluator, reference), 0
    for images in shards:
        scores.update(images, count, captions(range(count, count + len(images))))
        count += len(images)
    return scores.compute()
