"""Feature extractors: one pass over an image gives all that the scores read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.denoisers.digits import load_classifier, load_images


class Features(NamedTuple):
    """Pooled features (FID), spatial features (sFID) and logits (IS) of a batch of images."""

    pooled: Float[Tensor, "batch pooled"]
    spatial: Float[Tensor, "batch spatial"]
    logits: Float[Tensor, "batch classes"]


@dataclass(frozen=True)
class Evaluator:
    """Who judges the images, and against which reference.

    Args:
        name: goes into the name of every score, so that scores of different evaluators are never confused.
        extract: uint8 images to features.
        reference: the images that a perfect sampler would draw from.
        provenance: what identifies extractor and reference: hashes, counts.
    """

    name: str
    extract: Callable[[UInt8[Tensor, "batch channels height width"]], Features]
    reference: UInt8[Tensor, "images channels height width"]
    provenance: dict[str, str | int]


def digits_evaluator() -> Evaluator:
    """The shipped digit classifier against all 1,797 real digits: offline scores, not comparable with Inception's."""
    classifier, sha256 = load_classifier()
    images, _ = load_images()

    @torch.no_grad()
    def extract(batch: Tensor) -> Features:
        return Features(*classifier(batch))

    provenance = {
        "extractor_sha256": sha256,
        "reference": "scikit-learn digits, 16x16",
        "reference_images": len(images),
    }
    return Evaluator("digits features", extract, images, provenance)
