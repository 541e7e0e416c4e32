"""Statistics of two methods on the same images: what their differences, image by image, tell and what they do not."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL, POWER = 0.05, 0.8  # of the tests; chance to find a difference that is there
RESAMPLES, SEED = 2000, 0  # of the bootstrap
DRAWN = 2**22  # numbers that the bootstrap draws together: 32 MiB
Verdict = Literal["better", "worse", "not told apart"]


class PairedDifference(NamedTuple):
    """A method's values less another's on the same images."""

    images: int
    mean: float
    low: float  # ends of the 95 % interval of the mean
    high: float
    p: float  # of Wilcoxon's signed-rank test: whether the differences lie around 0
    verdict: Verdict  # of the first method
    needed: int | None  # images that tell the two apart; None where they do not differ at all

    @property
    def text(self) -> str:
        """The verdict, and where there is none how many images it would take."""
        more = f", {self.needed} images would" if self.verdict == "not told apart" and self.needed else ""
        return f"{self.verdict}{more}"


def compare_pairs(first: ArrayLike, second: ArrayLike, better: str, seed: int = SEED) -> PairedDifference:
    """Compare two methods by one value for each image.

    One is better or worse where the bootstrap's interval of the mean difference leaves out 0, Wilcoxon's test rejects, and
    both point to the same side; a few images far apart move the mean, and many that are a little apart the ranks.

    Args:
        first: values of the method that the verdict is of, one for each image.
        second: values of the other one, for the same images.
        better: ↑ or ↓, the side of better values.
        seed: of the bootstrap.

    Raises:
        ValueError: unequal numbers, fewer than two, values that are not finite, or another arrow.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if better not in ("↑", "↓"):
        raise ValueError(f"better must be ↑ or ↓, got {better!r}")
    if one.shape != other.shape or one.ndim != 1 or len(one) < 2:
        raise ValueError(
            f"paired values are two rows of the same length, at least 2; got {one.shape} and {other.shape}"
        )
    difference = one - other
    if not np.isfinite(difference).all():
        raise ValueError(f"the difference of image {int(np.argmin(np.isfinite(difference)))} is not finite")
    low, high = bootstrap_interval(difference, seed)
    p, side = signed_rank_test(difference)
    differs = p < LEVEL and (low > 0 < side or high < 0 > side)
    ahead = (side > 0) == (better == "↑")
    verdict: Verdict = ("better" if ahead else "worse") if differs else "not told apart"
    mean = float(difference.mean())
    return PairedDifference(len(difference), mean, low, high, p, verdict, images_needed(difference))


def bootstrap_interval(differences: NDArray[np.float64], seed: int, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the mean (Efron 1979), by scipy, of `RESAMPLES` resamples."""
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN // len(differences)),
        confidence_level=1 - level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return float(low), float(high)


def signed_rank_test(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Wilcoxon's signed-rank test: p, and the sum of signed ranks over its largest value, from -1 to 1; zeros are dropped."""
    present = differences[differences != 0]
    if not len(present):
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(present))
    test: Any = stats.wilcoxon(present)
    return float(test.pvalue), float((np.sign(present) * ranks).sum() / ranks.sum())


def images_needed(differences: NDArray[np.float64], level: float = LEVEL, power: float = POWER) -> int | None:
    """Number of images at which a mean difference like this one is found with the given power.

    n = ((z_{1 - level/2} + z_power) s / d)^2, the size of a two-sided paired z-test; None where the mean is 0.
    """
    mean, deviation = abs(float(differences.mean())), float(differences.std(ddof=1))
    if mean == 0:
        return None
    quantiles = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)
    return max(2, math.ceil((quantiles * deviation / mean) ** 2))
