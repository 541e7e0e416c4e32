"""Paired statistics against enumeration, theory, and simulation."""

import itertools

import numpy as np
import pytest

from tfmq_exp.report.paired_statistics import (
    bootstrap_interval,
    compare_pairs,
    images_needed,
    signed_rank_test,
)


def normal(count: int, mean: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, count)


def test_the_signed_rank_test_is_that_of_all_signs() -> None:
    """For ten differences: the share of all 1024 signs whose rank sum is at least as far from its middle."""
    differences = normal(10, 0.7)
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    own = (np.sign(differences) * ranks).sum()
    sums = np.array([(np.array(signs) * ranks).sum() for signs in itertools.product((-1, 1), repeat=10)])
    p, side = signed_rank_test(differences)
    assert p == pytest.approx((np.abs(sums) >= abs(own)).mean())
    assert side == pytest.approx(own / ranks.sum())


def test_zeros_are_no_differences() -> None:
    assert signed_rank_test(np.zeros(5)) == (1.0, 0.0)
    some = normal(30, 0.3)
    assert signed_rank_test(np.concatenate([some, np.zeros(7)])) == signed_rank_test(some)


def test_the_interval_is_that_of_theory_for_many_images_and_the_same_for_a_seed() -> None:
    differences = normal(4000, 0.2)
    low, high = bootstrap_interval(differences, 0)
    half = 1.96 * differences.std(ddof=1) / np.sqrt(4000)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.12 * half)
    assert bootstrap_interval(differences, 0) == (low, high) != bootstrap_interval(differences, 1)
    assert bootstrap_interval(np.full(5, 0.25), 0) == (0.25, 0.25)


def test_as_many_images_as_needed_find_the_difference_in_four_of_five_trials() -> None:
    sample = np.array([0.3 + 1.0, 0.3 - 1.0] * 50)  # mean 0.3, deviation 1 but for n - 1
    needed = images_needed(sample)
    assert needed is not None
    trials = np.random.default_rng(0).normal(0.3, 1.0, (4000, needed))
    z = trials.mean(1) / (trials.std(1, ddof=1) / np.sqrt(needed))
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.03)
    assert images_needed(sample - 0.3) is None or images_needed(sample - 0.3) > 10**6
    assert images_needed(np.array([1.0, -1.0])) is None


def test_verdicts_follow_the_side_that_is_better() -> None:
    first, second = normal(200, 1.0), normal(200, 0.0, 1)
    up, down = compare_pairs(first, second, "↑"), compare_pairs(first, second, "↓")
    assert (up.verdict, down.verdict) == ("better", "worse")
    assert up[:5] == down[:5]
    swapped = compare_pairs(second, first, "↑")
    assert swapped.verdict == "worse"
    assert (swapped.mean, swapped.p) == pytest.approx((-up.mean, up.p))
    same = compare_pairs(first, first, "↓")
    assert (same.verdict, same.needed, same.p, same.text) == ("not told apart", None, 1.0, "not told apart")


def test_a_few_images_far_apart_tell_nothing_against_the_others() -> None:
    """The mean rises by one image alone, the ranks say the opposite."""
    first = np.full(100, -0.1) + normal(100, 0) * 0.01
    first[0] = 1000.0
    found = compare_pairs(first, np.zeros(100), "↑")
    assert found.mean > 0
    assert found.p < 1e-6
    assert found.verdict == "not told apart"
    assert found.text == f"not told apart, {found.needed} images would"


def test_of_equal_methods_one_in_twenty_is_told_apart_at_most() -> None:
    told = [compare_pairs(normal(40, 0, s), normal(40, 0, 1000 + s), "↑").verdict for s in range(100)]
    assert sum(verdict != "not told apart" for verdict in told) <= 10  # 5 expected; more than 10 once in a hundred


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2,\)"):
        compare_pairs([1, 2, 3], [1, 2], "↑")
    with pytest.raises(ValueError, match="at least 2"):
        compare_pairs([1], [2], "↑")
    with pytest.raises(ValueError, match="difference of image 1 is not finite"):
        compare_pairs([1, np.inf], [1, 2], "↑")
    with pytest.raises(ValueError, match="better must be"):
        compare_pairs([1, 2], [1, 2], "up")
