"""What episodes say about a policy: metrics per episode, their means with intervals, comparisons.

A metric is a function of one record. It is None where the record lacks what it needs, as files
of older versions do. Such episodes are left out of its mean; without any other there is no mean.
Episodes that crashed have no outcome; only their number counts. Definitions of
progress and grounding are those of AgentBoard (arXiv 2401.13178).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

import numpy as np

from ..records.episodes import Episode
from . import Interval, mean_interval, paired_rate_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

Metric = Callable[[Episode], float | None]

_NAMED = 5  # seeds in an error
_GROUNDING = "grounding_accuracy"

# ------------------------------------------------------------------ of one episode


def success(episode: Episode) -> float:
    """1 where the task was done, otherwise 0; of one episode.

    `stepagent.evaluation.success_rate` is its mean over the episodes that did not crash.
    """
    return float(episode.success)


def reward(episode: Episode) -> float | None:
    """The sum of the environment's rewards."""
    return float(sum(episode.rewards)) if episode.rewards else None


def progress_curve(episode: Episode) -> NDArray[np.float64]:
    """Progress rate after t = 0, 1, …, T steps, (T + 1,): r_0 = 0, r_t = max_{i≤t} f(s_i).

    f(s_i) in [0, 1] is the environment's progress after step i. So it never falls, and is 1 in the
    end where the task was done.

    Raises:
        ValueError: for a progress outside [0, 1].
    """
    progress = np.array(episode.progress, dtype=np.float64)
    for step in np.flatnonzero(~((progress >= 0) & (progress <= 1)))[:1]:
        raise ValueError(
            f"the progress of episode {episode.id} must lie in [0, 1], got {progress[step]} at "
            f"step {step}"
        )
    return np.maximum.accumulate(np.append(0.0, progress))


def progress_rate(episode: Episode) -> float | None:
    """r_T: the progress rate at the end."""
    if "progress_rate" in episode.measured:
        return episode.measured["progress_rate"]
    return float(progress_curve(episode)[-1]) if episode.progress else None


def grounding_accuracy(episode: Episode) -> float | None:
    """Valid actions / steps."""
    return float(np.mean(episode.valid)) if episode.valid else episode.measured.get(_GROUNDING)


def steps(episode: Episode) -> float | None:
    """T, the number of actions."""
    return None if episode.measured and not episode.actions else float(len(episode.actions))


def repetition(episode: Episode) -> float | None:
    """The share of the T actions that do the same again although it changed nothing to be seen.

    That is 1/T · |{t ≥ 1: a_t = a_{t-1} and o_t = o_{t-1}}|, where o_t is the observation to
    which a_t is the answer. Texts are compared exactly; of an answer in an action format, what was
    read in it, without the thoughts.
    """
    turns = list(zip(episode.observations, episode.done, strict=True))
    if not turns:
        return None
    return sum(turn == before for before, turn in pairwise(turns)) / len(turns)


def agreement(episode: Episode) -> float | None:
    """The share of the steps with an answer of the expert at which it is the action taken.

    The actions are compared word for word, without the thoughts. This is of an episode, at the
    agent's own states; `stepagent.evaluation.expert_agreement` is of a model, at the expert's.
    """
    answered = [
        action == answer
        for action, answer in zip(episode.done, episode.expert_actions, strict=False)
        if answer is not None
    ]
    return float(np.mean(answered)) if answered else None


def step_reward(episode: Episode) -> float | None:
    """The mean of a method's step rewards over the steps that have one."""
    rewards = [reward for reward in episode.step_rewards if reward is not None]
    return float(np.mean(rewards)) if rewards else None


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        success,
        reward,
        progress_rate,
        grounding_accuracy,
        steps,
        repetition,
        agreement,
        step_reward,
    )
}

# The least and the largest value of those that have one.
BOUNDS: dict[str, tuple[float, float]] = dict.fromkeys(
    ("success", "progress_rate", "grounding_accuracy", "repetition", "agreement"), (0.0, 1.0)
)

# ------------------------------------------------------------------ of many


@dataclass(frozen=True)
class Summary:
    """Of the episodes that ended; ``crashed`` more have no outcome.

    metrics: name → mean over episodes with its 95 % interval, for those that any episode has.
    progress_curve: of `mean_progress_curve`; empty where progress was not recorded.
    invalid_actions: kind → how often.
    terminate_reasons: of all episodes, those that crashed too: why → how many.
    """

    episodes: int
    crashed: int
    metrics: dict[str, Interval]
    progress_curve: list[float]
    invalid_actions: dict[str, int]
    terminate_reasons: dict[str, int] = field(default_factory=dict)


def summarize(episodes: Sequence[Episode]) -> Summary:
    """Means over the episodes that ended, of which there must be one, or ValueError."""
    if not episodes:
        raise ValueError("episodes must hold at least one, got none")
    ended = [episode for episode in episodes if episode.crashed is None]
    if not ended:
        raise ValueError(
            f"an episode must have ended, got {len(episodes)} that crashed, the first: "
            f"{episodes[0].crashed}"
        )
    return Summary(
        episodes=len(ended),
        crashed=len(episodes) - len(ended),
        metrics=_intervals({name: [m(e) for e in ended] for name, m in METRICS.items()}, BOUNDS),
        progress_curve=mean_progress_curve(ended).tolist(),
        invalid_actions=invalid_actions(ended),
        terminate_reasons=dict(
            Counter(e.terminate_reason for e in episodes if e.terminate_reason is not None)
        ),
    )


def mean_progress_curve(
    episodes: Sequence[Episode], length: int | None = None
) -> NDArray[np.float64]:
    """The mean of the progress curves after 0, 1, …, ``length`` steps, (length + 1,).

    A curve that ended keeps its last value. length: None is the longest episode's; a
    smaller one cuts. Without any progress recorded it is empty.
    """
    curves = [progress_curve(e) for e in episodes if e.progress and e.crashed is None]
    if not curves:
        return np.zeros(0)
    size = max(map(len, curves)) if length is None else length + 1
    filled = [curve[np.minimum(np.arange(size), len(curve) - 1)] for curve in curves]
    return np.asarray(np.mean(filled, axis=0))


def invalid_actions(episodes: Sequence[Episode]) -> dict[str, int]:
    """How often each kind of invalid action occurred, the most frequent first.

    Those whose kind the environment does not name are ``"unnamed"``.
    """
    kinds = Counter(
        kind or "unnamed"
        for episode in episodes
        for valid, kind in zip(episode.valid, episode.invalid or repeat(None), strict=False)
        if not valid
    )
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0])))


def split_by(label: str, episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes by their ``"task"`` or ``"difficulty"``, sorted; those without it are left out."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        name = getattr(episode, label)
        if name is not None:
            groups.setdefault(name, []).append(episode)
    return dict(sorted(groups.items()))


# ------------------------------------------------------------------ two policies


@dataclass(frozen=True)
class PairedComparison:
    """Of two policies on the same episodes.

    pairs: of episodes, both of which ended; of ``crashed`` more pairs one did not.
    differences: name → mean of (this − the other), with its 95 % interval.
    """

    pairs: int
    crashed: int
    differences: dict[str, Interval]


def compare(episodes: Sequence[Episode], against: Sequence[Episode]) -> PairedComparison:
    """Each episode minus that of the other policy in the same environment, split and seed.

    Raises:
        ValueError: naming the seeds that only one of them has, or that one has twice; for no pair
            that ended.
    """
    these, others = _by_place("episodes", episodes), _by_place("against", against)
    _refuse_unmatched("episodes", these, "against", others)
    _refuse_unmatched("against", others, "episodes", these)
    pairs = [(these[place], others[place]) for place in these]
    ended = [(a, b) for a, b in pairs if a.crashed is None and b.crashed is None]
    if not ended:
        raise ValueError(f"a pair of episodes must have ended, got {len(pairs)} that crashed")
    differences = {
        name: [_difference(metric(a), metric(b)) for a, b in ended]
        for name, metric in METRICS.items()
    }
    ranges = {name: (low - high, high - low) for name, (low, high) in BOUNDS.items()}
    found = _intervals(differences, ranges)
    found["success"] = paired_rate_interval(
        [success(a) for a, _ in ended], [success(b) for _, b in ended]
    )
    return PairedComparison(len(ended), len(pairs) - len(ended), found)


_Place = tuple[str, str | None, int]


def _by_place(name: str, episodes: Sequence[Episode]) -> dict[_Place, Episode]:
    places = [(e.environment, e.split, e.seed) for e in episodes]
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise ValueError(
            f"{name} must have each episode once, got more than one of {_describe(twice)}"
        )
    return dict(zip(places, episodes, strict=True))


def _refuse_unmatched(
    name: str, these: dict[_Place, Episode], other_name: str, others: dict[_Place, Episode]
) -> None:
    if alone := [place for place in these if place not in others]:
        raise ValueError(
            f"{other_name} must have the episodes of {name}, got none of {_describe(alone)}"
        )


def _describe(places: Sequence[_Place]) -> str:
    named = [
        f"{environment} {'' if split is None else f'({split}) '}seed {seed}"
        for environment, split, seed in places[:_NAMED]
    ]
    more = len(places) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _intervals(
    columns: dict[str, list[float | None]], bounds: dict[str, tuple[float, float]]
) -> dict[str, Interval]:
    known = {name: [v for v in values if v is not None] for name, values in columns.items()}
    return {
        name: mean_interval(values, bounds=bounds.get(name))
        for name, values in known.items()
        if values
    }
