"""Who judges images, and against which reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.validate import COUNT, SWITCH, check_fields
from tfmq_exp.data.source import ImageSource
from tfmq_exp.denoisers.digits import load_classifier
from tfmq_exp.evaluation.features.extractor import Extractor, Features
from tfmq_exp.evaluation.references import NpzReference

MANIFOLD_IMAGES = 10_000  # as many as guided-diffusion's reference files hold for precision and recall


class CaptionMetric(Protocol):
    """Who says how well images fit their captions."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies the judge: plain JSON data."""
        ...

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], captions: Sequence[str]
    ) -> Float[Tensor, "batch"]:
        """A number for each pair, on the CPU."""
        ...


@dataclass(frozen=True)
class Evaluator:
    """Who judges the images, and against which reference.

    Args:
        name: goes into the name of every score, so that scores of different evaluators are never confused.
        extract: images to features.
        reference: the images that a perfect sampler would draw from, or their statistics.
        kid: also the kernel distance, for which the pooled features of all images are kept.
        precision_recall: also precision and recall, likewise.
        clip: also how well images fit the captions they were made from.
        manifold_images: the images of the reference, from its start, that KID, precision and recall are computed with.
    """

    name: str
    extract: Extractor
    reference: ImageSource | NpzReference
    kid: bool = False
    precision_recall: bool = False
    clip: CaptionMetric | None = None
    manifold_images: int = MANIFOLD_IMAGES

    def __post_init__(self) -> None:
        check_fields(self, kid=SWITCH, precision_recall=SWITCH, manifold_images=COUNT)

    @property
    def kept(self) -> int:
        """How many of the reference's pooled features the scores ask for."""
        return self.manifold_images if self.kid or self.precision_recall else 0

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the judge, without the reference: plain JSON data."""
        extras: dict[str, Any] = {"kid": self.kid, "precision_recall": self.precision_recall}
        if self.kept:
            extras["manifold_images"] = self.manifold_images
        if self.clip is not None:
            extras["clip"] = dict(self.clip.identity)
        return {"name": self.name, **self.extract.identity, **extras}


def digits_evaluator(
    reference: ImageSource, *, kid: bool = False, precision_recall: bool = False, manifold_images: int = MANIFOLD_IMAGES
) -> Evaluator:
    """The shipped digit classifier: offline scores of 16x16 gray images, not comparable with Inception's."""
    classifier, sha256 = load_classifier()

    def features(images: UInt8[Tensor, "batch 1 16 16"]) -> Features:
        if images.shape[1:] != (1, 16, 16):
            channels, height, width = images.shape[1:]
            size = f"{channels} channels of {height}x{width} pixels"
            raise ValueError(
                f"eval=digits judges gray images of 16x16 pixels, these have {size}; eval=inception takes any"
            )
        return Features(*classifier(images))

    extract = Extractor(features, (64, 112), {"extractor_sha256": sha256}, batch=512)
    return Evaluator(
        "digits features",
        extract,
        reference,
        kid=kid,
        precision_recall=precision_recall,
        manifold_images=manifold_images,
    )
