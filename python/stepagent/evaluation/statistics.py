"""How good an agent is, and how sure one can be: success rates, paired intervals, agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..acting.inspection import inspect
from ..data.actions import ActionFormat, FormatName
from ..data.actions import action_format as as_format
from ..data.branch import agreement
from ..data.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..records.episodes import Episode

_RESAMPLES = 10_000
_Z = 1.959963984540054  # the normal's 97.5 % quantile
_HALVINGS = 60  # of the range of a difference: down to the last bit


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; both ends are None where the values give none."""

    mean: float
    low: float | None
    high: float | None


def success_rate(episodes: Sequence[Episode]) -> float:
    """The share of episodes that succeeded, of those that did not crash.

    It is the mean of `stepagent.metrics.success`, which `stepagent.metrics.summarize` gives with
    its interval.

    Raises:
        ValueError: For no episodes, or none that ended.
    """
    if not episodes:
        raise ValueError("episodes must hold at least one, got none")
    ended = [episode.success for episode in episodes if episode.crashed is None]
    if not ended:
        raise ValueError(f"an episode must have ended, got {len(episodes)} that crashed")
    return float(np.mean(ended))


def mean_interval(
    values: ArrayLike, *, bounds: tuple[float, float] | None = None, seed: int = 0
) -> Interval:
    """The mean of ``values`` (n,) and the interval that suits them; none of a single value.

    Values that all lie at a bound are counts: Wilson's score interval. Others are resampled, and
    where there are bounds the interval takes in what n values cannot have shown: at 95 %, a share
    of up to z² / (n + z²) of all episodes is of a kind that none of n showed (Wilson's bound for 0
    of n), and those may lie at either bound. Equal values without bounds give no interval.

    Args:
        values: one of each episode, or one difference of each pair.
        bounds: the least and the largest value there can be; None where there are none.
        seed: of the resampling.

    Raises:
        ValueError: for no values, values that are not finite, or out of bounds.
    """
    array = _finite("values", values)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, None, None)
    if bounds is None:
        return bootstrap(array, seed=seed)
    low, high = bounds
    if array.min() < low or array.max() > high:
        raise ValueError(f"values must lie in [{low}, {high}], got {array.min()} to {array.max()}")
    if np.isin(array, bounds).all():
        rate = _wilson(int((array == high).sum()), len(array))
        return Interval(mean, *(low + (high - low) * end for end in rate))
    unseen = _Z**2 / (len(array) + _Z**2)
    ends = [mean - unseen * (mean - low), mean + unseen * (high - mean)]
    found = bootstrap(array, seed=seed)
    ends += [end for end in (found.low, found.high) if end is not None]
    return Interval(mean, min(ends), max(ends))


def rate_interval(outcomes: ArrayLike) -> Interval:
    """The rate of ``outcomes`` (n,), each 0 or 1, with Wilson's score interval; none for n = 1.

    Raises:
        ValueError: for no outcomes, or one that is neither 0 nor 1.
    """
    return mean_interval(_outcomes("outcomes", outcomes), bounds=(0.0, 1.0))


def share_interval(counts: ArrayLike, totals: ArrayLike, *, seed: int = 0) -> Interval:
    """Σ counts / Σ totals of n groups, with its interval over the groups; none for n = 1.

    For steps, which are alike within an episode: whole groups are resampled. As `mean_interval`, it
    takes in what n groups cannot have shown, so it has a width where all of them agree.

    Args:
        counts: (n,) of each group, in [0, its total].
        totals: (n,) of each group, > 0.
        seed: of the resampling.

    Raises:
        ValueError: for no groups, another number of totals, or a count that is out of range.
    """
    own, whole = _finite("counts", counts), _finite("totals", totals)
    if len(own) != len(whole):
        raise ValueError(f"totals must have length {len(own)}, got {len(whole)}")
    if (whole <= 0).any() or (own < 0).any() or (own > whole).any():
        raise ValueError(f"counts must lie in [0, totals] and totals be > 0, got {own} of {whole}")
    share, n = float(own.sum() / whole.sum()), len(own)
    if n == 1:
        return Interval(share, None, None)
    picks = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))
    low, high = np.quantile(own[picks].sum(axis=1) / whole[picks].sum(axis=1), [0.025, 0.975])
    unseen = _Z**2 / (n + _Z**2)
    return Interval(
        share,
        min(float(low), share - unseen * share),
        max(float(high), share + unseen * (1 - share)),
    )


def paired_rate_interval(outcomes: ArrayLike, others: ArrayLike) -> Interval:
    """The difference of two rates on the same n episodes, with Tango's score interval (1998).

    It is for matched pairs what Wilson's is for one rate: the differences that a score test does
    not reject, so it has a width where all pairs agree, too. None for n = 1.

    Args:
        outcomes: (n,) 0 or 1.
        others: (n,) 0 or 1, the other policy's on the same episodes.

    Raises:
        ValueError: for no outcomes, other than 0 and 1, or another number of them.
    """
    ours, theirs = _outcomes("outcomes", outcomes), _outcomes("others", others)
    if len(ours) != len(theirs):
        raise ValueError(f"others must have length {len(ours)}, got {len(theirs)}")
    n, won, lost = len(ours), int((ours > theirs).sum()), int((ours < theirs).sum())
    mean = (won - lost) / n
    if n == 1:
        return Interval(mean, None, None)
    return Interval(mean, -_tango(lost, won, n), _tango(won, lost, n))


def bootstrap(values: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean and percentile-bootstrap interval of ``values`` (n,), resampled over episodes."""
    return stratified_bootstrap([values], seed=seed)


def stratified_bootstrap(groups: Sequence[ArrayLike], *, seed: int = 0) -> Interval:
    """The mean over groups of the mean within, and its 95 % percentile-bootstrap interval.

    Episodes are resampled within each group and the groups (training seeds) are kept. Given
    differences of two policies on the same episodes, this is the paired comparison. Where the
    values of every group are equal, resampling shows nothing and there is no interval.

    Raises:
        ValueError: for no groups, an empty group or values that are not finite.
    """
    if not len(groups):
        raise ValueError("groups must hold at least one, got none")
    arrays = [_finite(f"group {i}", group) for i, group in enumerate(groups)]
    mean = float(np.mean([array.mean() for array in arrays]))
    if all((array == array[0]).all() for array in arrays):
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(array, rng) for array in arrays], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a non-empty list of finite numbers, got {array!r}")
    return array


def _outcomes(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = _finite(name, values)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(f"{name} must each be 0 or 1, got {array!r}")
    return array


def _wilson(successes: int, n: int) -> tuple[float, float]:
    """The rates p with |successes − n p| ≤ z √(n p (1 − p))."""
    middle = (successes + _Z**2 / 2) / (n + _Z**2)
    half = _Z / (n + _Z**2) * (successes * (n - successes) / n + _Z**2 / 4) ** 0.5
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def _tango(won: int, lost: int, n: int) -> float:
    """The largest difference δ with (won − lost − n δ)² ≤ z² n (2 q + δ − δ²), where q is the
    likeliest share of lost pairs given δ."""
    low, high = (won - lost) / n, 1.0
    if low == high:
        return high
    for _ in range(_HALVINGS):
        delta = (low + high) / 2
        b = (2 * n - won + lost) * delta - won - lost
        root = max(0.0, b * b + 8 * n * lost * delta * (1 - delta)) ** 0.5
        variance = n * ((root - b) / (2 * n) + delta * (1 - delta))
        inside = (won - lost - n * delta) ** 2 <= _Z**2 * variance
        low, high = (delta, high) if inside else (low, delta)
    return low


def _resampled_means(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    picks = rng.integers(len(values), size=(_RESAMPLES, len(values)))
    means: NDArray[np.float64] = values[picks].mean(axis=1)
    return means


def expert_agreement(
    model: PreTrainedModel,
    trunks: Sequence[Trunk],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """The share of the expert's steps at which the greedy agent acts exactly as the expert.

    This is of a model, at the states of the expert's trunks. `stepagent.metrics.agreement` is of an
    episode: at the agent's own states, with the answers of the expert recorded there.

    Args:
        action_format: "plain" compares the tokens, others the actions that they read in the texts,
            for which they need the ``tokenizer``.

    Raises:
        ValueError: For no trunks, and as `stepagent.inspect`.
    """
    if not trunks:
        raise ValueError("trunks must hold at least one, got none")
    branches = inspect(
        model, trunks, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=eos_token_id
    )
    form = as_format(action_format)
    return agreement(trunks, branches, form=form, tokenizer=tokenizer)
