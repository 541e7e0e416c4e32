"""FID, sFID and IS by torchmetrics, from features that are extracted once."""

import warnings
from collections.abc import Iterable

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from tfmq_exp.evaluation.features import Evaluator, Features


class Given(nn.Module):
    """Stands where torchmetrics expects an extractor: the features have been extracted already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features


class Scores:
    """Streaming scores: moments for the two Fréchet distances, logits for the Inception score.

    IS is the mean over `splits` shuffled parts (torch-fidelity's convention), with a fixed shuffle.
    """

    def __init__(self, evaluator: Evaluator, splits: int = 10) -> None:
        self.evaluator, self.splits = evaluator, splits
        example = evaluator.extract(evaluator.reference[:2])
        self.fid = FrechetInceptionDistance(feature=Given(example.pooled.shape[1]))
        self.sfid = FrechetInceptionDistance(feature=Given(example.spatial.shape[1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that IS keeps its features, which here are 10 numbers
            self.inception = InceptionScore(feature=Given(example.logits.shape[1]), splits=splits)
        self.count = 0
        for batch in evaluator.reference.split(512):
            self._moments(evaluator.extract(batch), real=True)

    def _moments(self, features: Features, *, real: bool) -> None:
        self.fid.update(features.pooled, real=real)
        self.sfid.update(features.spatial, real=real)

    def update(self, images: UInt8[Tensor, "batch channels height width"]) -> None:
        """Take generated images into account."""
        features = self.evaluator.extract(images)
        self._moments(features, real=False)
        self.inception.update(features.logits)
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """`fid`, `sfid` (lower is better) and `is` (higher is better).

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"scores need at least two images, got {self.count}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2020)  # torch-fidelity's default
            inception = self.inception.compute()[0] if self.count >= self.splits else torch.tensor(float("nan"))
        return {"fid": float(self.fid.compute()), "sfid": float(self.sfid.compute()), "is": float(inception)}


def score(evaluator: Evaluator, shards: Iterable[UInt8[Tensor, "batch channels height width"]]) -> dict[str, float]:
    """Scores of images that come in shards."""
    scores = Scores(evaluator)
    for images in shards:
        scores.update(images)
    return scores.compute()
