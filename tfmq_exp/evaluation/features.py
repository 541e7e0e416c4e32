"""Feature extractors of images: one forward pass gives the features of all scores.

Published FID, sFID and IS are computed with the Inception network of 2015-12-05, here torch-fidelity's port of it.
guided-diffusion's evaluator reads the nodes `pool_3`, `mixed_6/conv` and the logits without bias from the same graph;
in the port these are the output of `AvgPool`, of `Mixed_6d.branch1x1`, and `logits_unbiased`.
"""

import importlib.metadata
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tfmq_exp.core.file_kind import why_missing
from tfmq_exp.core.files import sha256_of
from tfmq_exp.core.finite import NotFiniteError, require_finite_weights
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.denoisers.digits import load_classifier
from tfmq_exp.denoisers.emoji import load_emoji_classifier
from tfmq_exp.denoisers.loading.checkpoint import read_tensors

RELEASED = "weights-inception-2015-12-05-6726825d.pth"
RELEASED_SHA256 = "6726825d"  # how the hash begins, by the file's own name
POOLED, CHANNELS, SIDE = 2048, 7, 17  # sFID reads the first 7 channels of 17x17 (arXiv 2103.03841, as guided-diffusion)
log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Pooled features (FID, KID, precision, recall), spatial features (sFID) and logits (IS)."""

    pooled: Float[Tensor, "batch pooled"]
    spatial: Float[Tensor, "batch spatial"]
    logits: Float[Tensor, "batch classes"]


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features."""

    network: Callable[[UInt8[Tensor, "batch channels height width"]], Features]  # moves images to its own device
    widths: tuple[int, int]  # number of pooled and of spatial features
    identity: Mapping[str, Any] = field(default_factory=dict)  # all that features depend on: plain JSON data
    batch_size: int = 64
    device: str = "cpu"  # where features of all images are compared with each other

    def __post_init__(self) -> None:
        check_fields(self, batch_size=COUNT)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "images channels height width"]) -> Features:
        """Extract features of any number of images: float32, on the CPU; NotFiniteError for others than finite ones."""
        batches = [self.network(batch) for batch in images.split(self.batch_size)]
        features = Features(*(torch.cat(part).float().cpu() for part in zip(*batches, strict=True)))
        for name, values in features._asdict().items():
            if wrong := int((~values.isfinite().all(1)).sum()):
                raise NotFiniteError(f"the {name} features of {wrong} of {len(values)} images are not finite")
        return features


def classifier_extractor(
    classifier: Callable[[Tensor], Any], sha256: str, widths: tuple[int, int], shape: tuple[int, int, int], scored: str
) -> Extractor:
    """Features of a shipped classifier: no download, and scores not comparable with Inception's.

    Args:
        classifier: of uint8 images; gives pooled features, spatial ones and logits.
        sha256: of its weights.
        widths: number of pooled and of spatial features.
        shape: channels, height and width of its images; ValueError for others.
        scored: which evaluator this is and what it takes, for that error.
    """

    def features(images: UInt8[Tensor, "batch channels height width"]) -> Features:
        if tuple(images.shape[1:]) != shape:
            channels, height, width = images.shape[1:]
            raise ValueError(
                f"{scored}, these have {channels} channels of {height}x{width} pixels; eval=inception takes any"
            )
        return Features(*classifier(images))

    return Extractor(features, widths, {"extractor_sha256": sha256}, batch_size=512)


def digits_extractor() -> Extractor:
    """Features of the shipped classifier of gray 16x16 images."""
    return classifier_extractor(
        *load_classifier(), (64, 112), (1, 16, 16), "eval=digits scores gray images of 16x16 pixels"
    )


def emoji_extractor(folder: str | None = None) -> Extractor:
    """Features of the classifier of 64x64 emojis by category, in the folder of their text-to-image model."""
    scored = "eval=emoji scores RGB images of 64x64 pixels"
    return classifier_extractor(*load_emoji_classifier(folder), (64, 112), (3, 64, 64), scored)


def load_inception(path: Path) -> FeatureExtractorInceptionV3:
    """The network with the weights of a file, `.pth` or `.safetensors`; every tensor has to fit, and be float32.

    Raises:
        FileNotFoundError: no such file; says where it is published.
        ValueError: damaged, refused by `read_tensors`, another network's weights, or weights that are not finite.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no Inception weights at {path}{why_missing(path)}: nothing is downloaded; put {RELEASED} of torch-fidelity's "
            "release v0.2.0 (github.com/toshas/torch-fidelity/releases) there, or set paths.inception to where it is"
        )
    tensors = {name: x for name, x in read_tensors(path).items() if not name.endswith("num_batches_tracked")}
    if wrong := {name: x.dtype for name, x in tensors.items() if x.dtype is not torch.float32}:
        raise ValueError(f"{path}: {min(wrong)} is {wrong[min(wrong)]}; the Inception network is float32")
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
    counters = {f"{name}num_batches_tracked": torch.tensor(0) for name in norms}  # of training steps: unused
    # The constructor reads its weights by an unrestricted torch.load, so it gets a copy of the tensors, never the file.
    copy = io.BytesIO()
    torch.save(tensors | counters, copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], copy)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds weights of another network than {RELEASED}: {reason}") from error
    require_finite_weights(network, f"{path}: the weights")
    return network


class InceptionFeatures(nn.Module):
    """Features of RGB images of any size: TF1's bilinear resize to 299 (no antialiasing), (x - 128) / 128, float32."""

    def __init__(self, network: FeatureExtractorInceptionV3) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Extract 2048 pooled features, 17x17x7 = 2023 spatial ones (flattened H, W, C as ADM's), 1008 logits without bias."""
        if images.dtype is not torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"Inception takes uint8 images (batch, 3, height, width), got {found}")
        maps: list[Float[Tensor, "batch 7 17 17"]] = []
        branch = self.network.Mixed_6d.branch1x1
        with branch.register_forward_hook(lambda _module, _inputs, output: maps.append(output[:, :CHANNELS])):
            pooled, logits = self.network(images.to(self.network.fc.weight.device))
        return Features(pooled, maps[0].permute(0, 2, 3, 1).flatten(1), logits)


def inception_extractor(weights: str, batch_size: int = 64, device: str | None = None) -> Extractor:
    """The extractor of the scores that papers report.

    Args:
        weights: the released file, or the same tensors as `.safetensors`.
        batch_size: images in one forward pass.
        device: of the network; None for CUDA where there is one.
    """
    path, place = Path(weights), device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = InceptionFeatures(load_inception(path)).to(place)
    sha256 = sha256_of(path)
    if not sha256.startswith(RELEASED_SHA256):
        log.warning("%s is not the released %s: its scores compare only if the tensors are the same", path, RELEASED)
    identity = {
        "extractor_sha256": sha256,
        "resize": "TF1 bilinear to 299, float32",
        "versions": {name: importlib.metadata.version(name) for name in ("torch-fidelity", "torchmetrics")},
    }
    return Extractor(network, (POOLED, SIDE * SIDE * CHANNELS), identity, batch_size, place)
