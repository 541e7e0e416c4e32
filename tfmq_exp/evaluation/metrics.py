"""Metrics of features: Fréchet distances (FID of pooled, sFID of spatial ones), Inception score, KID, CMMD, precision and recall."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_fidelity.metric_prc import calculate_precision_recall_part
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

SPLITS, SEED, SUBSETS = 10, 2020, 100  # torch-fidelity's defaults
BLOCK = 1024  # rows of a matrix of distances that are in memory at once
NEIGHBOUR = 3  # the ball of a feature reaches to its third neighbour
Rows = Float[Tensor, "images features"]


class GaussianStatistics(NamedTuple):
    """Mean and covariance of features, float64."""

    mean: Float[Tensor, "features"]
    covariance: Float[Tensor, "features features"]  # with n - 1, as numpy.cov and guided-diffusion's files have it


class FeatureMoments(Metric):
    """Mean and covariance of features, from sums in float64 that add up over batches and processes."""

    full_state_update = False
    count: Int[Tensor, ""]
    total: Float[Tensor, "features"]
    outer: Float[Tensor, "features features"]

    def __init__(self, num_features: int) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)  # `merge_state` adds processes
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Rows) -> None:
        rows = features.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.t(), rows)

    def compute(self) -> GaussianStatistics:
        """Mean and covariance; ValueError for fewer than two images, which have none."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {int(self.count)}")
        mean = self.total / self.count
        return GaussianStatistics(mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1))


class FrechetDistance(FeatureMoments):
    """Fréchet distance of generated features to given statistics of real ones, which torchmetrics' own class cannot take."""

    def __init__(self, real: GaussianStatistics) -> None:
        super().__init__(len(real.mean))
        self.real = real

    def compute(self) -> Tensor:
        return frechet_distance(self.real, super().compute(), rank=int(self.count) - 1)


def frechet_distance(
    real: GaussianStatistics, generated: GaussianStatistics, rank: int | None = None
) -> Float[Tensor, ""]:
    """|mu_r - mu_g|^2 + tr(S_r) + tr(S_g) - 2 tr (S_r S_g)^(1/2) (arXiv 1706.08500, equation 6), as torchmetrics has it.

    `rank` is an upper bound of that of the generated covariance, n - 1 for n images. Where there are fewer images than
    features it saves most of the time: the eigenvalues of S_r S_g are those within the range of S_g.
    """
    if rank is not None and 2 * rank < len(real.mean):
        # Outside of that range the generated distribution is a point: means differ by their distance, and all variance of
        # the real one counts. The range by arXiv 0909.4061, algorithm 4.1: exact where the rank is so low.
        probes = torch.randn(len(real.mean), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        basis, _ = torch.linalg.qr(generated.covariance @ probes)
        one, other = (GaussianStatistics(basis.t() @ mean, basis.t() @ cov @ basis) for mean, cov in (real, generated))
        apart, near = real.mean - generated.mean, one.mean - other.mean
        outside = apart.dot(apart) - near.dot(near) + real.covariance.trace() - one.covariance.trace()
        return frechet_distance(one, other) + outside
    means = (real.mean - generated.mean).square().sum(dim=-1)
    traces = real.covariance.trace() + generated.covariance.trace()
    return means + traces - 2 * torch.linalg.eigvals(real.covariance @ generated.covariance).sqrt().real.sum(dim=-1)


def inception_score(logits: Rows) -> float:
    """Inception score (arXiv 1606.03498), mean over 10 parts of all images in torch-fidelity's random order.

    A part's score is at most its number of images.
    """
    count = len(logits)
    if count < SPLITS:
        raise ValueError(f"an Inception score over {SPLITS} parts needs as many images, got {count}")
    shuffled = logits[torch.from_numpy(np.random.RandomState(SEED).permutation(count))]
    return _mean_score([shuffled[i * count // SPLITS : (i + 1) * count // SPLITS] for i in range(SPLITS)])


def inception_score_adm(logits: Rows, split: int = 5000) -> float:
    """Mean over parts of `split` images in the order given, the last may be shorter, as guided-diffusion's evaluator does.

    Files ordered by class get a score that is far too low.
    """
    return _mean_score(logits.split(split))


def _mean_score(parts: Sequence[Rows]) -> float:
    """Mean of the parts' scores, in double precision; within a part order matters in the last bit only, and is fixed."""
    scores: list[float] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # torchmetrics shuffles, by the global generator
        warnings.simplefilter("ignore", UserWarning)  # that it keeps its features, and of one part's deviation
        torch.default_generator.manual_seed(SEED)
        for part in parts:
            metric = InceptionScore(feature=nn.Identity(), splits=1, sync_on_compute=False)
            metric.update(part.double())
            scores.append(float(metric.compute()[0]))
    return sum(scores) / len(scores)


def kernel_distance(real: Rows, generated: Rows, subset_size: int = 1000) -> float:
    """KID (arXiv 1801.01401): squared MMD under (x.y / d + 1)^3, mean over 100 random subsets, by torchmetrics.

    Subsets have `subset_size` images, or as many as there are. In double precision, because the distance is a small
    difference of large sums.
    """
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise ValueError(f"KID needs two images on both sides, got {len(real)} real, {len(generated)} generated")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps its features
        metric = KernelInceptionDistance(nn.Identity(), sync_on_compute=False, subsets=SUBSETS, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(SEED)
        return float(metric.compute()[0])


def maximum_mean_discrepancy(real: Rows, generated: Rows, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD (arXiv 2401.09603): `scale` times the squared MMD under exp(-|x - y|^2 / (2 sigma^2)), with all pairs.

    Pairs of a feature with itself count, as in the authors' program (Gretton et al. 2012, equation 5). In double precision,
    for blocks of rows. Both sets need not have the same number of images, but their numbers bias it.
    """

    def mean(a: Rows, b: Rows) -> float:
        blocks = (torch.cdist(rows, b).square_().div_(-2 * sigma**2).exp_().sum() for rows in a.split(BLOCK))
        return float(sum(map(float, blocks))) / (len(a) * len(b))

    real, generated = real.double(), generated.double()
    return scale * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))


def precision_recall(real: Rows, generated: Rows, rows: int = 1000) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) with k = 3, by torch-fidelity.

    Precision: the share of generated features inside the ball of some real one; recall: the reverse. The distances of
    `rows` features to all others are in memory together.
    """
    if min(len(real), len(generated)) <= NEIGHBOUR:
        counts = f"{len(real)} real, {len(generated)} generated"
        raise ValueError(f"precision and recall need more than {NEIGHBOUR} images on both sides, got {counts}")
    return calculate_precision_recall_part(generated, real, NEIGHBOUR, rows)
