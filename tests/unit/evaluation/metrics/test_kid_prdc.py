"""Kernel distance, precision and recall against loops over pairs of images."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric

from tfmq_exp.evaluation.metrics import kid_prdc
from tfmq_exp.evaluation.metrics.kid_prdc import kernel_distance, precision_recall


def features(count: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, 6, generator=generator) + 0.3 * seed


def plain_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate (arXiv 1801.01401, equation 4), pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within = [np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_distance_of_all_images() -> None:
    real, generated = features(25, 0), features(25, 1)
    expected = plain_kernel_distance(real.double().numpy(), generated.double().numpy())
    assert kernel_distance(real, generated) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_random_subsets_is_near_torch_fidelitys_and_always_the_same() -> None:
    real, generated = features(400, 0), features(300, 1)
    torch.manual_seed(1)
    ours = kernel_distance(real, generated, subset_size=100)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert kernel_distance(real, generated, subset_size=100) == ours
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    theirs = kid_features_to_metric(generated, real, kid_subset_size=100, verbose=False)
    spread = theirs["kernel_inception_distance_std"] / math.sqrt(kid_prdc.SUBSETS)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], abs=5 * spread)


def plain_precision(real: np.ndarray, generated: np.ndarray) -> float:
    """The share of generated features that lie within the distance from some real one to its third neighbour."""

    def inside(feature: np.ndarray) -> bool:
        for centre in real:
            radius = sorted(np.linalg.norm(real - centre, axis=1))[3]  # the first is its own, 0
            if np.linalg.norm(feature - centre) <= radius:
                return True
        return False

    return float(np.mean([inside(feature) for feature in generated]))


def test_precision_and_recall() -> None:
    real, generated = features(60, 0), features(45, 2, spread=0.6)
    a, b = real.double().numpy(), generated.double().numpy()
    expected = pytest.approx((plain_precision(a, b), plain_precision(b, a)), rel=1e-6)
    assert precision_recall(real, generated) == expected
    assert len({*expected.expected, 0.0, 1.0}) == 4
    assert precision_recall(real, generated, rows=13) == expected


def test_too_few_images_have_no_score_and_say_so() -> None:
    with pytest.raises(ValueError, match="KID needs two images on both sides, got 1 real, 9 generated"):
        kernel_distance(features(1, 0), features(9, 1))
    with pytest.raises(ValueError, match="more than 3 images on both sides, got 9 real, 3 generated"):
        precision_recall(features(9, 0), features(3, 1))
    assert not any(map(math.isnan, precision_recall(features(4, 0), features(4, 1))))
