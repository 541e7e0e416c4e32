"""Features of images: one pass of an extractor gives all that the scores read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.core.validate import COUNT, check_fields


class Features(NamedTuple):
    """Pooled features (FID, KID, precision, recall), spatial features (sFID) and logits (IS)."""

    pooled: Float[Tensor, "batch pooled"]
    spatial: Float[Tensor, "batch spatial"]
    logits: Float[Tensor, "batch classes"]


@dataclass(frozen=True)
class Extractor:
    """A network whose inner layers are the features.

    Args:
        network: uint8 images to features; moves images to where it is.
        widths: how many pooled and how many spatial features it has.
        identity: hashes, the rule that resizes, versions of libraries: plain JSON data.
        batch: images in one forward pass.
        device: where features are compared with each other, once there are all.
    """

    network: Callable[[UInt8[Tensor, "batch channels height width"]], Features]
    widths: tuple[int, int]
    identity: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self, batch=COUNT)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "images channels height width"]) -> Features:
        """Features of any number of images, float32, on the CPU.

        Raises:
            NotFiniteError: features that are not finite, of which no score can be made.
        """
        parts = [self.network(batch) for batch in images.split(self.batch)]
        features = Features(*(torch.cat(part).float().cpu() for part in zip(*parts, strict=True)))
        for name, values in features._asdict().items():
            if wrong := int((~values.isfinite().all(1)).sum()):
                raise NotFiniteError(f"the {name} features of {wrong} of {len(values)} images are not finite")
        return features
