"""Moments and the Fréchet distance against numpy and scipy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.evaluation.material import frechet, frechet_of_few
from tfmq_exp.evaluation.metrics.fid import RunningMoments, frechet_distance


def rows(count: int, width: int, seed: int) -> Tensor:
    """Correlated features far from zero, as pooled activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * 0.3
    return (torch.randn(count, width, generator=generator) @ mixing + 5 + seed).float()


def moments(features: Tensor, *sizes: int) -> RunningMoments:
    found = RunningMoments.zeros(features.shape[1])
    for batch in features.split(sizes or len(features)):
        found.update(batch)
    return found


def test_mean_and_covariance_are_numpys() -> None:
    features = rows(50, 9, 0)
    mean, covariance = moments(features, 7, 1, 42).gaussian()
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_parts_merge_into_the_whole() -> None:
    features = rows(60, 9, 0)
    part, other = moments(features[:13]), moments(features[13:], 40, 7)
    part.merge(RunningMoments.of(other.tensors()))
    assert part.count == 60
    for ours, whole in zip(part.gaussian(), moments(features).gaussian(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [200, 6], ids=["regular", "singular"])
def test_frechet_distance_is_the_definition(count: int) -> None:
    real, generated = rows(count, 12, 0), rows(count + 3, 12, 1)
    ours = frechet_distance(moments(real).gaussian(), moments(generated).gaussian())
    oracle = frechet if count > 12 else frechet_of_few
    assert ours == pytest.approx(oracle(real.double().numpy(), generated.double().numpy()), rel=1e-6)


@pytest.mark.parametrize("others", [200, 8], ids=["regular", "singular"])
def test_few_generated_images_are_compared_within_their_range(others: int) -> None:
    real, generated = rows(others, 30, 0), rows(9, 30, 1)
    ours = frechet_distance(moments(real).gaussian(), moments(generated).gaussian(), rank=8)
    wanted = frechet_of_few(real.double().numpy(), generated.double().numpy())
    assert ours == pytest.approx(wanted, rel=1e-6)
    assert ours == pytest.approx(frechet_distance(moments(real).gaussian(), moments(generated).gaussian()), rel=1e-4)


def test_the_oracles_agree() -> None:
    a, b = rows(8, 5, 0).double().numpy(), rows(9, 5, 1).double().numpy()
    assert frechet(a, b) == pytest.approx(frechet_of_few(a, b), rel=1e-9)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least two images, got 1"):
        moments(rows(1, 3, 0)).gaussian()
