"""Training runs as the unit of a claim: what differs between two arms, over runs and episodes.

A difference between two trained agents has two sources of chance: the training run (seed, rounding,
processor) and the episodes that it is measured on. Episodes within a few runs say nothing about the
first, which is the larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_RESAMPLES = 4_000


@dataclass(frozen=True)
class RunsInterval:
    """A mean over training runs with its 95 % interval, and each run's own mean.

    ``low`` and ``high`` are None for a single run, which has no spread.
    """

    mean: float
    low: float | None
    high: float | None
    per_run: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The smallest of the runs."""
        return min(self.per_run)


def bootstrap_runs(runs: Sequence[ArrayLike], *, seed: int = 0) -> RunsInterval:
    """The mean of several training runs, with a bootstrap in two levels.

    Runs are resampled with replacement, and within each of them its episodes. Given one run's
    differences between two arms on the same episodes, this is the paired comparison of the arms.

    Args:
        runs: R runs, each (E_r,) finite values of its episodes, E_r ≥ 1.
        seed: Of the resampling.

    Returns:
        The mean over runs of each run's mean, and the 2.5th and 97.5th percentile of 4,000
        resamples (Davison and Hinkley 1997, section 3.8).

    Raises:
        ValueError: For no runs, an empty run, or values that are not finite.
    """
    arrays = [np.asarray(run, dtype=np.float64) for run in runs]
    if not arrays:
        raise ValueError("runs must hold at least one run, got none")
    for i, array in enumerate(arrays):
        if array.ndim != 1 or not array.size or not np.isfinite(array).all():
            raise ValueError(f"runs[{i}] must be a non-empty list of finite numbers, got {array!r}")
    per_run = tuple(float(array.mean()) for array in arrays)
    mean = float(np.mean(per_run))
    if len(arrays) == 1:
        return RunsInterval(mean, None, None, per_run)
    low, high = np.quantile(_resampled(arrays, np.random.default_rng(seed)), [0.025, 0.975])
    return RunsInterval(mean, float(low), float(high), per_run)


def _resampled(
    arrays: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) means. A run that is drawn twice has its episodes drawn anew each time."""
    count = len(arrays)
    drawn = rng.integers(count, size=(_RESAMPLES, count))
    means = np.empty((_RESAMPLES, count))
    for i, array in enumerate(arrays):
        places = np.nonzero(drawn == i)
        picks = rng.integers(len(array), size=(len(places[0]), len(array)))
        means[places] = array[picks].mean(axis=1)
    result: NDArray[np.float64] = means.mean(axis=1)
    return result
