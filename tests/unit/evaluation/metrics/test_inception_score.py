"""The Inception score in both conventions, written down plainly in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tfmq_exp.evaluation.metrics.inception_score import inception_score, inception_score_adm


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
