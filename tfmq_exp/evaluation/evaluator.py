"""Evaluation settings: feature extractor, reference, and which metrics are computed (`conf/eval/`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.validate import COUNT, SWITCH, check_fields
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.evaluation.features.extractor import Extractor
from tfmq_exp.evaluation.references import NpzReference


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
