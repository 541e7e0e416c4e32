"""The shipped text-to-image model of emojis: where its folder is, and the classifier that evaluates its pictures.

The pipeline and the classifier are trained by ``scripts/train_emoji.py`` on Noto Emoji (Apache-2.0), pictures of 64x64 on white.
"""

from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.denoisers.digits import read_weights

FOLDER = Path(__file__).parent / "weights" / "emoji"
CLASSIFIER = FOLDER / "classifier.safetensors"
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
            for a, b in zip(widths, widths[1:], strict=False)
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
