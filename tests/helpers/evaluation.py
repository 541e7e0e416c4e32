"""Helpers for tests of scores: tiny images, image datasets, the textbook's Fréchet distance, scores in one call."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_exp.evaluation.features import Extractor, Features
from tfmq_exp.evaluation.references import ReferenceStatistics, reference_statistics
from tfmq_exp.evaluation.scores import Evaluator, Scores


class TensorDataset:
    """Images in memory as an image dataset."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.identity = {"set": "a test's images"}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.images.split(size))


class MeanGrey:
    """The mean pixel of an image, as a score that needs no caption."""

    identity = {"metric": "mean grey"}
    needs_captions = False

    def __call__(self, images: Tensor, captions: Sequence[object]) -> Tensor:
        return images.float().mean((1, 2, 3))


def pictures(count: int, size: int, seed: int, channels: int = 3, noise: float = 20.0) -> Tensor:
    """Coloured clouds under noise, uint8: images that differ in more than their noise."""
    generator = torch.Generator().manual_seed(seed)
    clouds = 60 * torch.randn(count, channels, 3, 3, generator=generator) + 110 + 10 * seed
    smooth = F.interpolate(clouds, size=(size, size), mode="bicubic")
    grain = noise * torch.randn(count, channels, size, size, generator=generator)
    return (smooth + grain).round().clamp(0, 255).to(torch.uint8)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B)) of the rows of two matrices, as guided-diffusion's evaluator has it."""
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(mean + np.trace(left + right - 2 * scipy.linalg.sqrtm(left @ right).real))


def frechet_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """The same for fewer rows than columns: with A = X'X and B = Y'Y, tr sqrt(A B) is the sum of X Y's singular values."""
    x, y = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean + np.square(x).sum() + np.square(y).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum())


def linear_extractor(shape: tuple[int, int, int], batch_size: int = 64) -> Extractor:
    """A random linear extractor of 5 pooled and 7 spatial features and 4 logits: nothing about it is special."""
    generator = torch.Generator().manual_seed(0)
    pixels = shape[0] * shape[1] * shape[2]
    weights = [torch.randn(pixels, n, generator=generator) * 0.12 / pixels**0.5 for n in (5, 7, 4)]
    weights[2] = 5 * (weights[2] - weights[2].mean(0))  # brightness alone decides no class

    def network(images: Tensor) -> Features:
        rows = images.flatten(1).double()  # so that the size of a batch cannot be seen
        return Features(*((rows @ w.double()).float() for w in weights))

    return Extractor(network, (5, 7), {"extractor": "linear"}, batch_size)


def measured(evaluator: Evaluator) -> ReferenceStatistics:
    return reference_statistics(evaluator.reference, evaluator.extract, evaluator.kept, lambda _done, _of: None)


def score(
    evaluator: Evaluator,
    reference: ReferenceStatistics,
    shards: Iterable[Tensor],
    captions: Callable[[range], Sequence[str]] = lambda _: (),
) -> dict[str, float]:
    """Scores of images that come in shards, in the order of their indices, made from the captions of these indices."""
    scores, count = Scores(evaluator, reference), 0
    for images in shards:
        scores.update(images, count, captions(range(count, count + len(images))))
        count += len(images)
    return scores.compute()
