"""Moments and the Fréchet distance against numpy, scipy and torchmetrics."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.helpers.evaluation import frechet, frechet_of_few
from tfmq_exp.evaluation.metrics.fid import FeatureMoments, FrechetDistance, frechet_distance


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
    mean, covariance = moments(features, 7, 1, 42).statistics()
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_parts_merge_into_the_whole() -> None:
    features = rows(60, 9, 0)
    part, other = moments(features[:13]), moments(features[13:], 40, 7)
    part.merge_state(other.metric_state)
    assert part.count == 60
    for ours, whole in zip(part.statistics(), moments(features).statistics(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [200, 6], ids=["regular", "singular"])
def test_frechet_distance_is_the_definition(count: int) -> None:
    real, generated = rows(count, 12, 0), rows(count + 3, 12, 1)
    ours = frechet_distance(moments(real).statistics(), moments(generated).statistics())
    oracle = frechet if count > 12 else frechet_of_few
    assert ours == pytest.approx(oracle(real.double().numpy(), generated.double().numpy()), rel=1e-6)


@pytest.mark.parametrize("others", [200, 8], ids=["regular", "singular"])
def test_few_generated_images_are_compared_within_their_range(others: int) -> None:
    real, generated = rows(others, 30, 0), rows(9, 30, 1)
    ours = frechet_distance(moments(real).statistics(), moments(generated).statistics(), rank=8)
    expected = frechet_of_few(real.double().numpy(), generated.double().numpy())
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours == pytest.approx(
        float(frechet_distance(moments(real).statistics(), moments(generated).statistics())), rel=1e-4
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
    ours = FrechetDistance(moments(real).statistics())
    for batch in generated.split(3):
        ours.update(batch)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-9 if count > 12 else 1e-5)


def test_the_oracles_agree() -> None:
    a, b = rows(8, 5, 0).double().numpy(), rows(9, 5, 1).double().numpy()
    assert frechet(a, b) == pytest.approx(frechet_of_few(a, b), rel=1e-9)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least two images, got 1"):
        moments(rows(1, 3, 0)).statistics()
