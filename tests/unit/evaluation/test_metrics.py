"""Metrics against numpy, scipy, torchmetrics, torch-fidelity, and loops over pairs of images."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.helpers.evaluation import frechet, frechet_of_few
from tfmq_exp.evaluation.metrics import (
    SUBSETS,
    FeatureMoments,
    FrechetDistance,
    frechet_distance,
    inception_score,
    inception_score_adm,
    kernel_distance,
    precision_recall,
)


def rows(count: int, width: int, seed: int) -> Tensor:
    """Correlated features far from zero, as pooled activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * 0.3
    return (torch.randn(count, width, generator=generator) @ mixing + 5 + seed).float()


def moments(features: Tensor, *sizes: int) -> FeatureMoments:
    found = FeatureMoments(features.shape[1])
    for batch in features.split(sizes or len(features)):
        found.update(batch)
    return found


def test_mean_and_covariance_are_numpys() -> None:
    features = rows(50, 9, 0)
    mean, covariance = moments(features, 7, 1, 42).compute()
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_parts_merge_into_the_whole() -> None:
    features = rows(60, 9, 0)
    part, other = moments(features[:13]), moments(features[13:], 40, 7)
    part.merge_state(other.metric_state)
    assert part.count == 60
    for ours, whole in zip(part.compute(), moments(features).compute(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [200, 6], ids=["regular", "singular"])
def test_frechet_distance_is_the_definition(count: int) -> None:
    real, generated = rows(count, 12, 0), rows(count + 3, 12, 1)
    ours = frechet_distance(moments(real).compute(), moments(generated).compute())
    oracle = frechet if count > 12 else frechet_of_few
    assert ours == pytest.approx(oracle(real.double().numpy(), generated.double().numpy()), rel=1e-6)


@pytest.mark.parametrize("others", [200, 8], ids=["regular", "singular"])
def test_few_generated_images_are_compared_within_their_range(others: int) -> None:
    real, generated = rows(others, 30, 0), rows(9, 30, 1)
    ours = frechet_distance(moments(real).compute(), moments(generated).compute(), rank=8)
    expected = frechet_of_few(real.double().numpy(), generated.double().numpy())
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours == pytest.approx(
        float(frechet_distance(moments(real).compute(), moments(generated).compute())), rel=1e-4
    )


class Given(nn.Identity):
    """Features in the place of torchmetrics' extractor."""

    num_features = 12


@pytest.mark.parametrize("count", [200, 4])
def test_the_metric_is_torchmetrics(count: int) -> None:
    """Its own class computes both covariances from features; ours gets the statistics of one side."""
    real, generated = rows(300, 12, 0), rows(count, 12, 1)
    theirs = FrechetInceptionDistance(Given(), normalize=False)
    theirs.update(real.double(), real=True)
    theirs.update(generated.double(), real=False)
    ours = FrechetDistance(moments(real).compute())
    for batch in generated.split(3):
        ours.update(batch)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-9 if count > 12 else 1e-5)


def test_the_oracles_agree() -> None:
    a, b = rows(8, 5, 0).double().numpy(), rows(9, 5, 1).double().numpy()
    assert frechet(a, b) == pytest.approx(frechet_of_few(a, b), rel=1e-9)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least two images, got 1"):
        moments(rows(1, 3, 0)).compute()


def logits(count: int, *, by_class: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (count,), generator=generator)
    labels = labels.sort().values if by_class else labels
    return 4 * torch.nn.functional.one_hot(labels, 7) + torch.randn(count, 7, generator=generator)


def plain(part: np.ndarray) -> float:
    """exp of the mean KL divergence between p(y|x) and p(y)."""
    p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
    return math.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def test_ten_shuffled_parts() -> None:
    rows = logits(103)
    shuffled = rows.double().numpy()[np.random.RandomState(2020).permutation(103)]
    edges = [103 * i // 10 for i in range(11)]
    expected = np.mean([plain(shuffled[a:b]) for a, b in itertools.pairwise(edges)])
    assert inception_score(rows) == pytest.approx(expected, rel=1e-9)


def test_consecutive_parts() -> None:
    rows = logits(103)
    parts = [rows.double().numpy()[a : a + 40] for a in (0, 40, 80)]
    assert inception_score_adm(rows, 40) == pytest.approx(np.mean([plain(part) for part in parts]), rel=1e-9)


def test_the_split_is_guided_diffusions() -> None:
    rows = logits(5003)
    parts = [rows.double().numpy()[:5000], rows.double().numpy()[5000:]]
    assert inception_score_adm(rows) == pytest.approx(np.mean([plain(part) for part in parts]), rel=1e-9)


def test_order_by_class_ruins_only_the_score_of_consecutive_parts() -> None:
    mixed, sorted_ = logits(700), logits(700, by_class=True)
    torch.manual_seed(1)
    first = inception_score_adm(mixed, 100)
    torch.manual_seed(2)
    assert inception_score_adm(mixed, 100) == first, "to the last bit, whatever was drawn before"
    assert inception_score_adm(sorted_, 100) < 0.5 * inception_score_adm(mixed, 100)
    assert inception_score(sorted_) == pytest.approx(inception_score(mixed), rel=0.05)


def test_too_few_images_have_no_score() -> None:
    with pytest.raises(ValueError, match="over 10 parts needs as many images, got 9"):
        inception_score(logits(9))


@pytest.mark.parametrize("count", [10, 19, 20, 57])
def test_a_part_has_at_most_the_score_of_its_number_of_images(count: int) -> None:
    certain = 100 * torch.eye(count)  # every image of a class of its own
    sizes = [(i + 1) * count // 10 - i * count // 10 for i in range(10)]
    assert inception_score(certain) == pytest.approx(np.mean(sizes), rel=1e-9)


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
    spread = theirs["kernel_inception_distance_std"] / math.sqrt(SUBSETS)
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


def test_too_few_images_have_no_distance_and_say_so() -> None:
    with pytest.raises(ValueError, match="KID needs two images on both sides, got 1 real, 9 generated"):
        kernel_distance(features(1, 0), features(9, 1))
    with pytest.raises(ValueError, match="more than 3 images on both sides, got 9 real, 3 generated"):
        precision_recall(features(9, 0), features(3, 1))
    assert not any(map(math.isnan, precision_recall(features(4, 0), features(4, 1))))
