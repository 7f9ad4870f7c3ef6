"""How good an agent is, and how sure one can be: success rates, paired intervals, agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..acting.inspection import inspect
from ..data.actions import ActionFormat
from ..data.actions import action_format as as_format
from ..data.branch import agreement
from ..data.encoding import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..records.episodes import Episode

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def success_rate(episodes: Sequence[Episode]) -> float:
    """The share of episodes that succeeded, of those that did not crash; ValueError for none."""
    if not episodes:
        raise ValueError("episodes is empty; a rate needs at least one")
    ended = [episode.success for episode in episodes if episode.crashed is None]
    if not ended:
        raise ValueError(f"all {len(episodes)} episodes crashed; a rate needs one that ended")
    return float(np.mean(ended))


def bootstrap(values: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean and percentile-bootstrap interval of ``values`` (n,), resampled over episodes."""
    return stratified_bootstrap([values], seed=seed)


def stratified_bootstrap(groups: Sequence[ArrayLike], *, seed: int = 0) -> Interval:
    """The mean over groups of the mean within, and its 95 % percentile-bootstrap interval.

    Episodes are resampled within each group and the groups (training seeds) are kept. Given
    differences of two policies on the same episodes, this is the paired comparison.

    :raises ValueError: for no groups, an empty group or values that are not finite.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays:
        raise ValueError("groups is empty; at least one is needed")
    for i, array in enumerate(arrays):
        if array.ndim != 1 or not array.size or not np.isfinite(array).all():
            raise ValueError(f"group {i} must be a non-empty list of finite numbers, got {array!r}")
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(array, rng) for array in arrays], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean([a.mean() for a in arrays])), float(low), float(high))


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
    action_format: str | ActionFormat | Callable[[str], str] = "plain",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """The share of the expert's steps at which the greedy agent acts exactly as the expert.

    :param action_format: plain compares the tokens, others the actions that they read in the texts,
        for which they need the ``tokenizer``.
    :raises ValueError: for no trunks, and as :func:`stepagent.inspect`.
    """
    if not trunks:
        raise ValueError("trunks is empty; agreement needs at least one")
    branches = inspect(
        model, trunks, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=eos_token_id
    )
    form = as_format(action_format)
    return agreement(trunks, branches, form=form, tokenizer=tokenizer)
