"""The shipped models of scikit-learn's handwritten digits, and the classifier that evaluates their samples.

One is a DDPM (a U-Net), the other a rectified flow by class (a transformer). The networks are trained by
``scripts/train_digits.py`` and stored next to this file as safetensors, so that every stage of the project runs on a
laptop without a download. Images are 16x16, one channel, float in [-1, 1] for the denoisers and uint8 for the
classifier, which takes the place of Inception.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.core.file_kind import why_missing
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.loading.checkpoint import read_tensors
from tfmq_exp.denoisers.loading.condition_encoders import ClassLabels
from tfmq_exp.denoisers.loading.scheduler_config import FLOW

WEIGHTS = Path(__file__).parent / "weights"
IMAGE_SIZE = 16


class DigitFeatures(NamedTuple):
    """Inputs of the offline metrics: pooled features (FID), spatial features (sFID) and logits (IS)."""

    pooled: Float[Tensor, "batch 64"]
    spatial: Float[Tensor, "batch 112"]
    logits: Float[Tensor, "batch 10"]


def build_unet() -> UNet2DModel:
    """Architecture of the denoiser of DDPM: residual and attention blocks at 16, 8 and 4 pixels, 1.1 M parameters.

    8 groups per GroupNorm: with one channel per group the norm would cancel the additive temporal feature.
    """
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


def build_dit() -> DiTTransformer2DModel:
    """Architecture of the transformer by class (DiT, arXiv 2212.09748): 3 blocks of width 128, 1.1 M parameters.

    An image is 64 patches; classes are the digits, and 10 for none. It predicts the velocity of a rectified flow,
    noise - image, at timesteps from 0 (image) to 1000 (noise).
    """
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=IMAGE_SIZE,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )


def build_schedule() -> DDPMScheduler:
    """The noise schedule of DDPM (arXiv 2006.11239, section 4): 1000 steps, beta linear from 1e-4 to 0.02."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 16x16 digits whose inner layers are the features of the offline metrics."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 32, 64, 64)
        strides = (1, 2, 1, 2)
        blocks = (
            nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        self.stages = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: UInt8[Tensor, "batch 1 16 16"]) -> DigitFeatures:
        """Features of uint8 images. `spatial` is the first 7 channels of the 4x4 map, flattened H, W, C as in ADM's sFID."""
        final = self.stages(images.to(self.head.weight.dtype) / 127.5 - 1)
        pooled = final.mean(dim=(2, 3))
        spatial = final[:, :7].permute(0, 2, 3, 1).flatten(1)
        return DigitFeatures(pooled, spatial, self.head(self.dropout(pooled)))


def read_weights(network: nn.Module, path: Path) -> str:
    """Load a file of weights into a network, strictly; returns its sha256. ValueError for other weights, or such with NaN."""
    if not path.exists():
        advice = "make them with `python scripts/train_digits.py all`"
        raise FileNotFoundError(f"no weights at {path}{why_missing(path)}; {advice}")
    try:
        network.load_state_dict(read_tensors(path), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another network's weights: {' '.join(str(error).split())}") from error
    require_finite_weights(network, f"{path}: the weights")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_denoiser(path: str | None = None) -> Denoiser:
    """The digits denoiser, from `path` or from the weights that the project ships."""
    network = build_unet()
    sha256 = read_weights(network, Path(path) if path else WEIGHTS / "denoiser.safetensors")
    config = build_schedule().config
    schedule = {key: config[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
    return Denoiser("digits", network.eval().requires_grad_(False), (1, IMAGE_SIZE, IMAGE_SIZE), schedule, sha256)


def load_dit(path: str | None = None) -> Denoiser:
    """The transformer of the digits by class, from `path` or from the weights that the project ships."""
    network = build_dit()
    sha256 = read_weights(network, Path(path) if path else WEIGHTS / "digits_dit.safetensors")
    return Denoiser(
        "digits_dit",
        network.eval().requires_grad_(False),
        (1, IMAGE_SIZE, IMAGE_SIZE),
        {"num_train_timesteps": 1000, "prediction_type": FLOW},
        sha256,
        encoder=ClassLabels(network.config["num_embeds_ada_norm"]),
    )


def load_classifier(path: str | None = None) -> tuple[DigitClassifier, str]:
    """The digits classifier that the offline metrics read their features from, and the hash of its weights."""
    classifier = DigitClassifier()
    sha256 = read_weights(classifier, Path(path) if path else WEIGHTS / "classifier.safetensors")
    return classifier.eval().requires_grad_(False), sha256
