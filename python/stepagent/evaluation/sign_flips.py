"""The mean of paired differences with an interval that holds at every number of pairs.

Where two arms do equally well pair by pair, each difference is as likely as its negative (Fisher's
randomisation). The values that a test by random signs does not reject are an interval whose ends
are quantiles of the means of random halves of the pairs (Hartigan 1969, typical values). It needs
neither bounds nor many pairs, and where few pairs differ it does not narrow, as a bootstrap does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .statistics import Interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_HALVES = 3_999  # with that of no pair, which is always the least, 4,000
_AT_ONCE = 256
_TAIL = 0.025


def sign_flip_interval(differences: ArrayLike, *, seed: int = 0) -> Interval:
    """The mean of ``differences`` (n,) with its 95 % interval by random signs.

    Its lower end is above 0 in at most 2.5 % of all samples whose differences are each as likely as
    their negatives, exactly and for every n; for others of mean 0, as n grows. An end is None where
    n pairs cannot tell it: for n < 6, always.

    Args:
        differences: finite, one of each pair, n ≥ 1.
        seed: of the random halves.

    Raises:
        ValueError: for no differences, or one that is not finite.
    """
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"differences must be a non-empty list of finite numbers, got {array!r}")
    means = _means_of_halves(array, np.random.default_rng(seed))
    place = int(_TAIL * (_HALVES + 1)) - 1
    low = np.sort(np.where(np.isnan(means), -np.inf, means))[place]
    high = -np.sort(np.where(np.isnan(means), -np.inf, -means))[place]
    return Interval(
        float(array.mean()),
        float(low) if np.isfinite(low) else None,
        float(high) if np.isfinite(high) else None,
    )


def _means_of_halves(
    differences: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Each pair is in each half or not, as a coin falls; nan for a half of none."""
    means = np.empty(_HALVES)
    for start in range(0, _HALVES, _AT_ONCE):
        stop = min(start + _AT_ONCE, _HALVES)
        coins = rng.integers(256, size=(stop - start, -(-len(differences) // 8)), dtype=np.uint8)
        halves = np.unpackbits(coins, axis=1, count=len(differences))
        sizes = halves.sum(axis=1, dtype=np.int64)
        sums = halves.astype(np.float64) @ differences
        means[start:stop] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
    return means
