"""When behaviour changed: splits of a sequence of counts, by likelihood and permutation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERMUTATIONS = 999


@dataclass(frozen=True)
class Change:
    """at: the first point of the new regime, from 0. p: of a split as good by chance."""

    at: int
    p: float


def change_points(
    labels: Sequence[NDArray[np.int64]], *, level: float = 0.01, seed: int = 0
) -> list[Change]:
    """Where the shares of behaviours changed along a sequence of points, as a run's cycles.

    The best split of the points into two regimes with shares of their own, by likelihood, counts
    where less than ``level`` of permutations of all episodes have one as good; then each side is
    split in turn.

    Args:
        labels: of each point the behaviours of its episodes.
        level: in (0, 1).
        seed: of the permutations.

    Returns:
        The changes in order of points; none for less than two.

    Raises:
        ValueError: for a point without episodes, or another level.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    for point, own in enumerate(labels):
        if not len(own):
            raise ValueError(f"a point must have at least one episode, got none at point {point}")
    return _split([np.asarray(own) for own in labels], 0, level, np.random.default_rng(seed))


def _split(
    labels: list[NDArray[np.int64]], first: int, level: float, rng: np.random.Generator
) -> list[Change]:
    if len(labels) < 2:
        return []
    joined = np.concatenate(labels)
    ends = np.cumsum([len(own) for own in labels])[:-1]
    at, gain = _best(joined, ends)
    chance = sum(_best(rng.permutation(joined), ends)[1] >= gain for _ in range(_PERMUTATIONS))
    p = (1 + chance) / (1 + _PERMUTATIONS)
    if gain <= 0 or p >= level:
        return []
    before = _split(labels[:at], first, level, rng)
    after = _split(labels[at:], first + at, level, rng)
    return [*before, Change(first + at, p), *after]


def _best(joined: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[int, float]:
    """The best first point of a second regime, and the gain in log-likelihood."""
    counts_NK = np.cumsum(np.eye(joined.max() + 1)[joined], axis=0)
    whole = counts_NK[-1]
    gains = [
        _likelihood(counts_NK[end - 1]) + _likelihood(whole - counts_NK[end - 1]) for end in ends
    ]
    best = int(np.argmax(gains))
    return best + 1, float(gains[best] - _likelihood(whole))


def _likelihood(counts_K: NDArray[np.float64]) -> float:
    """Of counts under their own shares."""
    some = counts_K[counts_K > 0]
    return float((some * np.log(some / some.sum())).sum())
