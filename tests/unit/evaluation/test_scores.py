"""Scores against the textbook formulas, in double precision."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tfmq_exp.evaluation.features import Evaluator, Features, digits_evaluator
from tfmq_exp.evaluation.scores import Scores, score


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B))."""
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(mean + np.trace(left + right - 2 * scipy.linalg.sqrtm(left @ right).real))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """A random linear extractor: cheap, and nothing about it is special."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(36, n, generator=generator) * 0.02 for n in (5, 7, 4)]

    def extract(images: Tensor) -> Features:
        rows = images.flatten(1).float()
        return Features(*(rows @ w for w in weights))

    reference = torch.randint(0, 256, (300, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return Evaluator("random", extract, reference, {})


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 200, (250, 1, 6, 6), generator=generator, dtype=torch.uint8)


def test_frechet_distances(evaluator: Evaluator, images: Tensor) -> None:
    ours = score(evaluator, [images])
    for name, part in (("fid", "pooled"), ("sfid", "spatial")):
        features = [getattr(evaluator.extract(x), part).double().numpy() for x in (evaluator.reference, images)]
        assert ours[name] == pytest.approx(frechet(*features), rel=1e-4)


def test_inception_score(evaluator: Evaluator, images: Tensor) -> None:
    scores = Scores(evaluator, splits=1)
    scores.update(images)
    p = evaluator.extract(images).logits.double().softmax(1).numpy()
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert scores.compute()["is"] == pytest.approx(math.exp(divergence), rel=1e-5)


def test_shards_make_no_difference_and_neither_does_the_global_seed(evaluator: Evaluator, images: Tensor) -> None:
    torch.manual_seed(5)
    whole = score(evaluator, [images])
    torch.manual_seed(6)
    parts = score(evaluator, images.split(37))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_the_reference_itself_is_at_distance_zero(evaluator: Evaluator) -> None:
    ours = score(evaluator, [evaluator.reference])
    assert abs(ours["fid"]) < 1e-3
    assert abs(ours["sfid"]) < 1e-3


def test_one_image_is_too_few(evaluator: Evaluator, images: Tensor) -> None:
    with pytest.raises(ValueError, match="at least two"):
        score(evaluator, [images[:1]])


def test_the_digit_classifier_knows_digits_and_its_scores_get_worse_with_noise() -> None:
    evaluator = digits_evaluator()
    clean = evaluator.reference[:400]
    noise = torch.randint(0, 128, clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noisy = (clean.int() + noise.int()).clamp(0, 255).to(torch.uint8)
    good, bad = score(evaluator, [clean]), score(evaluator, [noisy])
    assert good["fid"] < bad["fid"] / 5
    assert good["sfid"] < bad["sfid"]
    assert good["is"] > bad["is"]
    assert evaluator.name == "digits features"


def test_the_classifier_is_as_accurate_as_its_record_says_on_digits_it_never_saw() -> None:
    from tfmq_exp.denoisers.digits import load_classifier, load_images

    classifier, _ = load_classifier()
    images, labels = load_images()
    held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:360]
    accuracy = (classifier(images[held_out]).logits.argmax(1) == labels[held_out]).float().mean()
    assert accuracy >= 0.98
