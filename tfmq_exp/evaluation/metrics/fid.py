"""Mean and covariance of features, gathered batch by batch in double precision, and the distance of two of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class GaussianStatistics(NamedTuple):
    """The normal distribution that stands for features in a Fréchet distance, in float64."""

    mean: Float[Tensor, "features"]
    covariance: Float[Tensor, "features features"]  # with n - 1, as numpy.cov and guided-diffusion's files have it


@dataclass
class RunningMoments:
    """Sums over features. Those of two disjoint sets of images added are those of both.

    Args:
        count: images.
        total: sum of features, float64.
        outer: sum of the outer products of features with themselves, float64.
    """

    count: int
    total: Float[Tensor, "features"]
    outer: Float[Tensor, "features features"]

    @classmethod
    def zeros(cls, width: int) -> "RunningMoments":
        """Of no images."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def update(self, features: Float[Tensor, "batch features"]) -> None:
        """Take a batch into account."""
        rows = features.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.t(), rows)

    def merge(self, other: "RunningMoments") -> None:
        """Take the images of another into account."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def tensors(self) -> dict[str, Tensor]:
        """All three, by name."""
        return {"count": torch.tensor(self.count), "total": self.total, "outer": self.outer}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "RunningMoments":
        """The inverse of `tensors`."""
        return cls(int(tensors["count"]), tensors["total"], tensors["outer"])

    def gaussian(self) -> GaussianStatistics:
        """Mean and covariance.

        Raises:
            ValueError: fewer than two images, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        mean = self.total / self.count
        return GaussianStatistics(mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1))


class Given(nn.Module):
    """Stands where torchmetrics expects an extractor: the features have been extracted already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features


def frechet_distance(real: GaussianStatistics, generated: GaussianStatistics, rank: int | None = None) -> float:
    """|mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2)) (arXiv 1706.08500, equation 6), by torchmetrics.

    Its states are sums over n features; with n = 2 they are 2 mu and S + 2 mu mu^T, whatever number S was made from.

    Args:
        real: one distribution.
        generated: the other.
        rank: an upper bound of that of the generated covariance, n - 1 for n images. Where there are fewer images than
            features it saves most of the time: the eigenvalues of S_r S_g are those within the range of S_g.
    """
    outside = 0.0
    if rank is not None and 2 * rank < len(real.mean):
        real, generated, outside = within_range(real, generated, rank)
    width = len(real.mean)
    metric = FrechetInceptionDistance(feature=Given(width), sync_on_compute=False)  # processes were merged before
    for is_real in (True, False):  # no features: says their type, and that there is something to compute
        metric.update(torch.zeros(0, width, dtype=torch.float64), real=is_real)
    for gaussian, part in ((real, "real"), (generated, "fake")):
        mean, covariance = gaussian
        getattr(metric, f"{part}_features_sum").copy_(2 * mean)
        getattr(metric, f"{part}_features_cov_sum").copy_(covariance + 2 * torch.outer(mean, mean))
        getattr(metric, f"{part}_features_num_samples").fill_(2)
    return float(metric.compute()) + outside


def within_range(
    real: GaussianStatistics, generated: GaussianStatistics, rank: int
) -> tuple[GaussianStatistics, GaussianStatistics, float]:
    """Both in coordinates of a subspace that holds the range of the generated covariance, and the distance outside of it.

    There the generated distribution is a point: means differ by their distance, and all that the real one varies counts.
    """
    probes = torch.randn(len(real.mean), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(
        generated.covariance @ probes
    )  # arXiv 0909.4061, algorithm 4.1: exact where the rank is so low
    inside = [
        GaussianStatistics(basis.t() @ mean, basis.t() @ covariance @ basis) for mean, covariance in (real, generated)
    ]
    apart, apart_inside = real.mean - generated.mean, inside[0].mean - inside[1].mean
    outside = apart.dot(apart) - apart_inside.dot(apart_inside) + real.covariance.trace() - inside[0].covariance.trace()
    return inside[0], inside[1], float(outside)
