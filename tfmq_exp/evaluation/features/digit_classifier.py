"""Features of the shipped digit classifier: scores without any download, not comparable with Inception's."""

from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.denoisers.digits import load_classifier
from tfmq_exp.evaluation.features.extractor import Extractor, Features


def digits_extractor() -> Extractor:
    """Load the classifier of gray 16x16 images."""
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
