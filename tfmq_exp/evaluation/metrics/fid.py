"""Fréchet distances (FID of pooled, sFID of spatial features): mean and covariance of features, and their distance."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


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

    def update(self, features: Float[Tensor, "batch features"]) -> None:
        rows = features.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.t(), rows)

    def statistics(self) -> GaussianStatistics:
        """Mean and covariance; ValueError for fewer than two images, which have none."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {int(self.count)}")
        mean = self.total / self.count
        return GaussianStatistics(mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1))

    def compute(self) -> GaussianStatistics:
        return self.statistics()


class FrechetDistance(FeatureMoments):
    """Fréchet distance of generated features to given statistics of real ones, which torchmetrics' own class cannot take."""

    def __init__(self, real: GaussianStatistics) -> None:
        super().__init__(len(real.mean))
        self.real = real

    def compute(self) -> Tensor:
        return frechet_distance(self.real, self.statistics(), rank=int(self.count) - 1)


def frechet_distance(
    real: GaussianStatistics, generated: GaussianStatistics, rank: int | None = None
) -> Float[Tensor, ""]:
    """|mu_r - mu_g|^2 + tr(S_r) + tr(S_g) - 2 tr (S_r S_g)^(1/2) (arXiv 1706.08500, equation 6), as torchmetrics has it.

    Args:
        real: one distribution.
        generated: the other.
        rank: an upper bound of that of the generated covariance, n - 1 for n images. Where there are fewer images than
            features it saves most of the time: the eigenvalues of S_r S_g are those within the range of S_g.
    """
    if rank is not None and 2 * rank < len(real.mean):
        real, generated, outside = within_range(real, generated, rank)
        return frechet_distance(real, generated) + outside
    means = (real.mean - generated.mean).square().sum(dim=-1)
    traces = real.covariance.trace() + generated.covariance.trace()
    return means + traces - 2 * torch.linalg.eigvals(real.covariance @ generated.covariance).sqrt().real.sum(dim=-1)


def within_range(
    real: GaussianStatistics, generated: GaussianStatistics, rank: int
) -> tuple[GaussianStatistics, GaussianStatistics, Float[Tensor, ""]]:
    """Project both onto a subspace with the range of the generated covariance; also return the distance outside of it.

    Outside, the generated distribution is a point: means differ by their distance, and all variance of the real one counts.
    """
    probes = torch.randn(len(real.mean), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # arXiv 0909.4061, algorithm 4.1: exact where the rank is so low
    basis, _ = torch.linalg.qr(generated.covariance @ probes)
    inside = [GaussianStatistics(basis.t() @ mean, basis.t() @ cov @ basis) for mean, cov in (real, generated)]
    apart, apart_inside = real.mean - generated.mean, inside[0].mean - inside[1].mean
    outside = apart.dot(apart) - apart_inside.dot(apart_inside) + real.covariance.trace() - inside[0].covariance.trace()
    return inside[0], inside[1], outside
