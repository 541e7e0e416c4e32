"""The text-to-image model of emojis: where its folder is, and the classifier that evaluates its pictures.

The pipeline and the classifier are trained by ``scripts/train_emoji.py`` on Noto Emoji (Apache-2.0), pictures of 64x64 on white.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.digits import read_weights
from tfmq_exp.denoisers.pipelines.load import load_pipeline

FOLDER = Path(__file__).parent / "weights" / "emoji"
CLASSIFIER = "classifier.safetensors"
CATEGORIES = (
    *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities"),
    *("Objects", "Symbols", "Flags"),
)


class EmojiFeatures(NamedTuple):
    """Inputs of the metrics: pooled features (FID), spatial features (sFID) and logits (IS)."""

    pooled: Float[Tensor, "batch 64"]
    spatial: Float[Tensor, "batch 112"]
    logits: Float[Tensor, "batch 9"]


class EmojiClassifier(nn.Module):
    """A small convolutional classifier of emojis by category, whose inner layers are the features of metrics."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        blocks = (
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in pairwise(widths)
        )
        self.stages = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(widths[-1], len(CATEGORIES))

    def forward(self, images: UInt8[Tensor, "batch 3 64 64"]) -> EmojiFeatures:
        """Features of uint8 images. `spatial` is the first 7 channels of the 4x4 map, flattened H, W, C as in ADM's sFID."""
        final = self.stages(images.to(self.head.weight.dtype) / 127.5 - 1)
        pooled = final.mean(dim=(2, 3))
        spatial = final[:, :7].permute(0, 2, 3, 1).flatten(1)
        return EmojiFeatures(pooled, spatial, self.head(self.dropout(pooled)))


def emoji_folder(folder: str | None = None) -> Path:
    """The model's folder, by default the one in the package; FileNotFoundError where there is none."""
    found = Path(folder or FOLDER)
    if not found.is_dir():
        raise FileNotFoundError(f"no emoji model at {found}: make it with `python scripts/train_emoji.py`")
    return found


def load_emoji(path: str | None = None, settings: Mapping[str, Any] | None = None) -> Denoiser:
    """The text-to-image model from its folder; `settings` are those of the pipeline's call, see `load_pipeline`."""
    return load_pipeline(emoji_folder(path), name="emoji", settings=settings)


def load_emoji_classifier(folder: str | None = None) -> tuple[EmojiClassifier, str]:
    """The classifier in the model's folder, and the hash of its weights."""
    classifier = EmojiClassifier()
    sha256 = read_weights(classifier, emoji_folder(folder) / CLASSIFIER)
    return classifier.eval().requires_grad_(False), sha256
