"""Metrics that compare the pooled features themselves, not their moments: kernel distance, precision and recall."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_fidelity.metric_prc import calculate_precision_recall_part
from torchmetrics.image.kid import KernelInceptionDistance

SUBSETS, SEED = 100, 2020
NEIGHBOUR = 3  # the ball of a feature reaches to its third neighbour


def kernel_distance(
    real: Float[Tensor, "real features"], generated: Float[Tensor, "generated features"], subset_size: int = 1000
) -> float:
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


def precision_recall(
    real: Float[Tensor, "real features"], generated: Float[Tensor, "generated features"], rows: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) with k = 3, by torch-fidelity.

    Precision: the share of generated features inside the ball of some real one; recall: the reverse. The distances of
    `rows` features to all others are in memory together.
    """
    if min(len(real), len(generated)) <= NEIGHBOUR:
        counts = f"{len(real)} real, {len(generated)} generated"
        raise ValueError(f"precision and recall need more than {NEIGHBOUR} images on both sides, got {counts}")
    return calculate_precision_recall_part(generated, real, NEIGHBOUR, rows)
