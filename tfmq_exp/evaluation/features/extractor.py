"""Feature extractors of images: one forward pass gives the features of all scores. That of the shipped digit classifier."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.denoisers.digits import load_classifier


class Features(NamedTuple):
    """Pooled features (FID, KID, precision, recall), spatial features (sFID) and logits (IS)."""

    pooled: Float[Tensor, "batch pooled"]
    spatial: Float[Tensor, "batch spatial"]
    logits: Float[Tensor, "batch classes"]


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Args:
        network: uint8 images to features; moves images to its own device.
        widths: number of pooled and of spatial features.
        identity: all that features depend on (hashes, resize rule, versions of libraries): plain JSON data.
        batch_size: images in one forward pass.
        device: where features of all images are compared with each other.
    """

    network: Callable[[UInt8[Tensor, "batch channels height width"]], Features]
    widths: tuple[int, int]
    identity: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self, batch_size=COUNT)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "images channels height width"]) -> Features:
        """Extract features of any number of images: float32, on the CPU.

        Raises:
            NotFiniteError: features that are not finite.
        """
        batches = [self.network(batch) for batch in images.split(self.batch_size)]
        features = Features(*(torch.cat(part).float().cpu() for part in zip(*batches, strict=True)))
        for name, values in features._asdict().items():
            if wrong := int((~values.isfinite().all(1)).sum()):
                raise NotFiniteError(f"the {name} features of {wrong} of {len(values)} images are not finite")
        return features


def digits_extractor() -> Extractor:
    """Features of the shipped classifier of gray 16x16 images: no download, and scores not comparable with Inception's."""
    classifier, sha256 = load_classifier()

    def features(images: UInt8[Tensor, "batch 1 16 16"]) -> Features:
        channels, height, width = images.shape[1:]
        if (channels, height, width) != (1, 16, 16):
            raise ValueError(
                f"eval=digits scores gray images of 16x16 pixels, these have {channels} channels of {height}x{width} pixels; "
                "eval=inception takes any"
            )
        return Features(*classifier(images))

    return Extractor(features, (64, 112), {"extractor_sha256": sha256}, batch_size=512)
