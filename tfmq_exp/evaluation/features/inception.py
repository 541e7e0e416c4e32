"""The Inception network of 2015-12-05 that published FID, sFID and IS are computed with, by torch-fidelity's port of it.

guided-diffusion's evaluator reads the nodes `pool_3`, `mixed_6/conv` and the logits without bias from the same graph;
in the port these are the output of `AvgPool`, of `Mixed_6d.branch1x1`, and `logits_unbiased`.
"""

import importlib.metadata
import logging
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    FeatureExtractorInceptionV3,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)

from tfmq_exp.core.file_kind import why_missing
from tfmq_exp.core.files import sha256_of
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.data.source import ImageSource
from tfmq_exp.denoisers.loading.checkpoint import read_tensors
from tfmq_exp.evaluation.evaluator import MANIFOLD_IMAGES, CaptionMetric, Evaluator
from tfmq_exp.evaluation.features.extractor import Extractor, Features
from tfmq_exp.evaluation.references import NpzReference

NAME = "Inception 2015-12-05, torch-fidelity"
RELEASED = "weights-inception-2015-12-05-6726825d.pth"
RELEASED_SHA256 = "6726825d"  # how the hash begins, by the file's own name
POOLED, CHANNELS, SIDE = 2048, 7, 17  # sFID reads the first 7 channels of 17x17 (arXiv 2103.03841, as guided-diffusion)
log = logging.getLogger(__name__)


class Inception(FeatureExtractorInceptionV3):
    """Torch-fidelity's network without its constructor, which reads weights in a way that runs what the file asks for."""

    def __init__(self) -> None:
        FeatureExtractorBase.__init__(self, "inception-v3-compat", ["2048", "logits_unbiased"])
        self.feature_extractor_internal_dtype = torch.float32
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE_1(1280)
        self.Mixed_7c = InceptionE_2(POOLED)
        self.AvgPool = nn.AdaptiveAvgPool2d(output_size=(1, 1))
        self.fc = nn.Linear(POOLED, 1008)
        self.requires_grad_(False)
        self.eval()


def load_inception(path: Path) -> Inception:
    """The network with the weights of a file, `.pth` or `.safetensors`; every tensor has to fit, and be float32.

    Raises:
        FileNotFoundError: no such file; says where it is published.
        ValueError: damaged, refused by `read_tensors`, another network's weights, or weights that are not finite.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no Inception weights at {path}{why_missing(path)}: nothing is downloaded; put {RELEASED} of torch-fidelity's release v0.2.0 "
            "(github.com/toshas/torch-fidelity/releases) there, or set paths.inception to where it is"
        )
    tensors = read_tensors(path)
    with torch.device("meta"):
        network = Inception()
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    wrong = {name for name, x in tensors.items() if name not in counters and x.dtype is not torch.float32}
    if wrong:
        raise ValueError(f"{path}: {min(wrong)} is {tensors[min(wrong)].dtype}; the Inception network is float32")
    try:
        network.load_state_dict(tensors | counters, strict=True, assign=True)  # counters of training steps: unused
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds weights of another network than {RELEASED}: {reason}") from error
    require_finite_weights(network, f"{path}: the weights")
    return network.requires_grad_(False).eval()


class InceptionFeatures(nn.Module):
    """Features of RGB images of any size: TF1's bilinear resize to 299 (no antialiasing), (x - 128) / 128, float32."""

    def __init__(self, network: Inception) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Pooled 2048, spatial 17x17x7 = 2023 flattened H, W, C as ADM's statistics are, 1008 logits without bias.

        Raises:
            ValueError: images of another kind.
        """
        if images.dtype is not torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Inception judges uint8 images (batch, 3, height, width), got {images.dtype} {tuple(images.shape)}"
            )
        seen: list[Float[Tensor, "batch 192 17 17"]] = []
        branch = self.network.Mixed_6d.branch1x1
        with branch.register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, :CHANNELS])):
            pooled, logits = self.network(images.to(self.network.fc.weight.device))
        spatial = seen[0].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, logits)


def inception_evaluator(
    weights: str,
    reference: ImageSource | NpzReference,
    *,
    kid: bool = False,
    precision_recall: bool = False,
    clip: CaptionMetric | None = None,
    manifold_images: int = MANIFOLD_IMAGES,
    batch: int = 64,
    device: str | None = None,
) -> Evaluator:
    """Scores as papers report them.

    Args:
        weights: the released file, or the same tensors as `.safetensors`.
        reference: images, or a file of statistics.
        kid: see `Evaluator`.
        precision_recall: see `Evaluator`.
        clip: see `Evaluator`.
        manifold_images: see `Evaluator`.
        batch: images in one forward pass.
        device: where the network runs; CUDA, if there is any, unless said.
    """
    path = Path(weights)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = InceptionFeatures(load_inception(path)).to(place)
    sha256 = sha256_of(path)
    if not sha256.startswith(RELEASED_SHA256):
        log.warning("%s is not the released %s: its scores compare only if the tensors are the same", path, RELEASED)
    identity = {
        "extractor_sha256": sha256,
        "resize": "TF1 bilinear to 299, float32",
        "versions": {name: importlib.metadata.version(name) for name in ("torch-fidelity", "torchmetrics")},
    }
    return Evaluator(
        NAME,
        Extractor(network, (POOLED, SIDE * SIDE * CHANNELS), identity, batch, place),
        reference,
        kid=kid,
        precision_recall=precision_recall,
        clip=clip,
        manifold_images=manifold_images,
    )
