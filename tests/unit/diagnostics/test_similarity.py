"""CKA against its definitions written down slowly, and what it must not depend on."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tfmq_exp.diagnostics.similarity import similarities, similarity_sums, unbiased_hsic


def draw(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(rows: int = 40, columns: int = 6) -> tuple[Tensor, Tensor]:
    """Features, and the same with some noise and another mean."""
    x = draw(rows, columns, 0) @ torch.diag(torch.linspace(0.2, 3, columns, dtype=torch.float64))
    return x, x + 0.7 * draw(rows, columns, 1) + 2


def cka(x: Tensor, y: Tensor) -> float:
    return float(similarities(similarity_sums(x, y))[0])


def centred_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The biased estimate: trace of K H L H over (n - 1)^2."""
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k @ h @ m @ h)) / (n - 1) ** 2


def centred_cka(x: Tensor, y: Tensor) -> float:
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    return centred_hsic(k, m) / (centred_hsic(k, k) * centred_hsic(m, m)) ** 0.5


def test_the_estimate_is_the_mean_over_all_four_different_examples() -> None:
    """HSIC is E[k(1,2) m(1,2)] + E[k(1,2) m(3,4)] - 2 E[k(1,2) m(1,3)] of independent examples."""
    x, y = pair(7, 3)
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    terms = [k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in itertools.permutations(range(7), 4)]
    assert float(unbiased_hsic(torch.tensor(k), torch.tensor(m))) == pytest.approx(np.mean(terms), rel=1e-10)


def test_many_examples_have_the_cka_of_centred_gram_matrices() -> None:
    """The bias of the centred form falls with the number of examples, as 1 / n."""
    few, many = (abs(cka(*pair(n)) - centred_cka(*pair(n))) for n in (100, 1600))
    assert 1e-6 < many < 0.002
    assert many < few / 4


def test_the_mean_over_small_minibatches_is_that_of_all_examples() -> None:
    """Without bias for independent features, of which the centred form finds similarity in every minibatch."""
    x, y = draw(8000, 12, 2), draw(8000, 12, 3)
    parts = [similarity_sums(a, b) for a, b in zip(x.split(8), y.split(8), strict=True)]
    assert abs(float(similarities(torch.stack(parts).sum(0))[0])) < 0.03
    assert np.mean([centred_cka(a, b) for a, b in zip(x.split(8), y.split(8), strict=True)]) > 0.5
    unequal = [similarity_sums(a, b) for a, b in zip(*(z.split([100, 60]) for z in pair(160)), strict=True)]
    assert float(similarities(torch.stack(unequal).sum(0))[0]) == pytest.approx(cka(*pair(160)), abs=0.01)


def test_rotation_scale_and_mean_make_no_difference() -> None:
    x, y = pair()
    rotation = torch.linalg.qr(draw(6, 6, 4)).Q
    assert cka(3 * x @ rotation - 5, y / 7) == pytest.approx(cka(x, y), rel=1e-10)
    assert cka(x, 0.1 * x @ rotation + 1) == pytest.approx(1, abs=1e-12)
    assert cka(x, x @ draw(6, 6, 5)) < 0.99  # any other invertible map does


def test_large_means_cost_no_digits() -> None:
    x, y = pair()
    assert cka(x + 1e5, y - 1e5) == pytest.approx(cka(x, y), rel=1e-9)


def test_the_cosine_is_that_of_one_long_vector() -> None:
    x, y = pair()
    parts = [similarity_sums(a, b) for a, b in zip(x.split(7), y.split(7), strict=True)]
    a, b = x.numpy().ravel(), y.numpy().ravel()
    expected = np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(similarities(torch.stack(parts).sum(0))[1]) == pytest.approx(expected, rel=1e-12)


def test_features_that_do_not_vary_have_no_cka() -> None:
    x, y = pair()
    found = similarities(similarity_sums(x, y.mean(0).expand_as(y)))
    assert found.isnan().tolist() == [True, False]
    few = similarities(similarity_sums(x[:3], y[:3]))
    assert few.isnan().tolist() == [True, False]
    assert similarities(torch.zeros(4, 2, 6)).isnan().all()
