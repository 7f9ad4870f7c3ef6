"""Askers: at which of the agent's states an answer of the expert's is worth its price.

The question is MERMAIDE's (arXiv 2304.04668), a principal that pays to change what a learner it
has not met will do; here the payment is an answer, and the learner the agent in training.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..records.episodes import Episode
    from .named_askers import Ask

FEATURES = ("one", "logit", "step", "invalid", "seen", "repeated", "failed", "like_states")
_UNLEARNT = (0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # one less the action's own probability
_KEPT = 0.5  # what an answer to the learner of a cycle ago still counts
_BUCKETS = 2**16
_LIMIT = 10.0  # of a logit


class Asker:
    """Says what an answer at each of the agent's steps is worth: the highest are asked.

    Subclass it for a rule of your own: `worth` alone is needed. What it must remember from cycle to
    cycle, in a checkpoint and for the next learner is what `state` gives and `restore` takes.
    """

    def worth(self, episodes: Sequence[Episode]) -> list[NDArray[np.float64]]:
        """(T,) numbers for each of the episodes, which are over; any scale, but finite.

        Args:
            episodes: with the agent's ``logps``, ``trunk`` and outcome, without answers.
        """
        raise NotImplementedError(f"{type(self).__name__} must have worth(episodes)")

    def learn(self, episodes: Sequence[Episode], steps: Sequence[Sequence[int]]) -> None:
        """See what the expert answered: ``episodes[i].expert_actions[t]`` for t in ``steps[i]``,
        None where it had no answer."""

    def state(self) -> dict[str, NDArray[Any]]:
        """What was learnt, as arrays."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Be what `state` says. Called with what this class gave there."""


class UnsureAsker(Asker):
    """An answer is worth more, the less probable the agent's own action was."""

    def worth(self, episodes: Sequence[Episode]) -> list[NDArray[np.float64]]:
        """−Σ log π of the action's tokens, at temperature 1."""
        return [-_logps(episode) for episode in episodes]


class RandomAsker(Asker):
    """Every step is worth as much: what is asked is drawn by seed, episode's seed and step."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def worth(self, episodes: Sequence[Episode]) -> list[NDArray[np.float64]]:
        """A uniform number for each step."""
        seeds = [(self._seed % 2**64, episode.seed % 2**64) for episode in episodes]
        draws = [np.random.default_rng(pair) for pair in seeds]
        return [d.random(len(e.actions)) for d, e in zip(draws, episodes, strict=True)]


class EveryAsker(Asker):
    """All steps in their order, while the budget lasts."""

    def worth(self, episodes: Sequence[Episode]) -> list[NDArray[np.float64]]:
        """0."""
        return [np.zeros(len(episode.actions)) for episode in episodes]


class WorthAsker(Asker):
    """An answer is worth the probability that it differs from what the agent did, if it is new.

    A logistic regression over what is known without asking (`FEATURES`): how probable the action
    was, the step, whether the action before was invalid, whether the state came before in the
    episode and whether the action was the same there, whether the episode failed, and how often
    earlier answers at like states (the same observation and action) were different. It learns from
    the answers so far, online, as a Gaussian about its weights; before the first it is
    `UnsureAsker`. Of several steps with the same observation and action the k-th is worth 1/k.

    What it has learnt is `save_asker`'s to keep, and of use to the next learner.
    """

    def __init__(self) -> None:
        self._mean_F = np.array(_UNLEARNT)
        self._precision_FF = np.eye(len(FEATURES))
        self._asked_B = np.zeros(_BUCKETS, dtype=np.float32)
        self._differed_B = np.zeros(_BUCKETS, dtype=np.float32)

    def worth(self, episodes: Sequence[Episode]) -> list[NDArray[np.float64]]:
        """P(the answer differs) / (1 + how many steps with this observation and action precede)."""
        before: Counter[int] = Counter()
        found = []
        for episode in episodes:
            worth_T = self.differs(episode)
            for t, key in enumerate(_keys(episode)):
                worth_T[t] /= 1 + before[key]
                before[key] += 1
            found.append(worth_T)
        return found

    def differs(self, episode: Episode) -> NDArray[np.float64]:
        """(T,) the probability that the expert's answer would be another action."""
        return _logistic(self._features(episode) @ self._mean_F)

    def learn(self, episodes: Sequence[Episode], steps: Sequence[Sequence[int]]) -> None:
        """A step of online Bayes: the posterior of these answers is the next prior."""
        rows, differed, keys = [], [], []
        for episode, own in zip(episodes, steps, strict=True):
            answered = [t for t in own if episode.expert_actions[t] is not None]
            if not answered:
                continue
            rows.append(self._features(episode)[answered])
            differed += [episode.expert_actions[t] != episode.done[t] for t in answered]
            keys += [_keys(episode)[t] for t in answered]
        if not differed:
            return
        label_K = np.array(differed, dtype=np.float64)
        self._fit(np.concatenate(rows), label_K)
        np.add.at(self._asked_B, keys, 1)
        np.add.at(self._differed_B, keys, label_K.astype(np.float32))

    def state(self) -> dict[str, NDArray[Any]]:
        """The Gaussian, and the counts of like states."""
        return {
            "mean": self._mean_F.copy(),
            "precision": self._precision_FF.copy(),
            "asked": self._asked_B.copy(),
            "differed": self._differed_B.copy(),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Raises ValueError for the state of another kind of asker, or of other features."""
        for name, own in self.state().items():
            found = state.get(name)
            if found is None or found.shape != own.shape:
                got = "none" if found is None else f"shape {found.shape}"
                raise ValueError(
                    f"the state of a WorthAsker must have {name!r} of shape {own.shape}, got {got}"
                )
        self._mean_F = np.array(state["mean"], dtype=np.float64)
        self._precision_FF = np.array(state["precision"], dtype=np.float64)
        self._asked_B = np.array(state["asked"], dtype=np.float32)
        self._differed_B = np.array(state["differed"], dtype=np.float32)

    def _fit(self, row_KF: NDArray[np.float64], label_K: NDArray[np.float64]) -> None:
        """The mode and the curvature there (Laplace), by Newton's method: a convex problem."""
        one_FF = np.eye(len(FEATURES))
        prior_FF = one_FF + _KEPT * (self._precision_FF - one_FF)
        mean_F = self._mean_F.copy()

        def objective(weights_F: NDArray[np.float64]) -> float:
            logit_K, off_F = row_KF @ weights_F, weights_F - self._mean_F
            loss = np.logaddexp(0, logit_K).sum() - label_K @ logit_K
            return float(loss + 0.5 * off_F @ prior_FF @ off_F)

        for _ in range(100):
            p_K = _logistic(row_KF @ mean_F)
            slope_F = row_KF.T @ (p_K - label_K) + prior_FF @ (mean_F - self._mean_F)
            curve_FF = prior_FF + (row_KF.T * (p_K * (1 - p_K))) @ row_KF
            move_F = np.linalg.solve(curve_FF, slope_F)
            size = 1.0
            while objective(mean_F - size * move_F) > objective(mean_F) and size > 1e-6:
                size /= 2
            mean_F = mean_F - size * move_F
            if np.abs(size * move_F).max() < 1e-9:
                break
        p_K = _logistic(row_KF @ mean_F)
        self._mean_F = mean_F
        self._precision_FF = prior_FF + (row_KF.T * (p_K * (1 - p_K))) @ row_KF

    def _features(self, episode: Episode) -> NDArray[np.float64]:
        """(T, F), all known without an answer."""
        T, keys = len(episode.actions), _keys(episode)
        logp_T = _logps(episode)
        unlikely_T = np.maximum(-np.expm1(logp_T), np.exp(-_LIMIT))
        asked_T, differed_T = (a[keys].astype(float) for a in (self._asked_B, self._differed_B))
        columns = {
            "one": np.ones(T),
            "logit": np.clip(logp_T - np.log(unlikely_T), -_LIMIT, _LIMIT),
            "step": np.log1p(np.arange(T)),
            "invalid": [t > 0 and not episode.valid[t - 1] for t in range(T)],
            "seen": [o in episode.observations[:t] for t, o in enumerate(episode.observations)],
            "repeated": [key in keys[:t] for t, key in enumerate(keys)],
            "failed": np.full(T, not episode.success),
            "like_states": np.log((differed_T + 0.5) / (asked_T - differed_T + 0.5)),
        }
        return np.stack([np.asarray(columns[name], dtype=np.float64) for name in FEATURES], axis=1)


def asker_of(name: Ask, seed: int) -> Asker:
    """The asker of a name; the seed is of ``"random"``."""
    if name == "random":
        return RandomAsker(seed)
    return {"always": EveryAsker, "unsure": UnsureAsker, "worth": WorthAsker}[name]()


def save_asker(asker: Asker, path: Path | str, **told: int) -> None:
    """Write what an asker has learnt: safetensors.

    Args:
        told: numbers to keep beside it.
    """
    about = {"asker": type(asker).__name__, "told": json.dumps(told)}
    save_file(asker.state(), path, metadata=about)


def load_asker(asker: Asker, path: Path | str) -> dict[str, int]:
    """Have an asker go on from what one of its class learnt; the numbers kept beside it.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: for another asker's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file that an asker was saved in, got none")
    with safe_open(path, framework="numpy") as file:
        about = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("asker") != type(asker).__name__:
        raise ValueError(
            f"{path} must hold a {type(asker).__name__}, got {about.get('asker', 'no asker')}"
        )
    asker.restore(state)
    told: dict[str, int] = json.loads(about.get("told", "{}"))
    return told


def _logps(episode: Episode) -> NDArray[np.float64]:
    """(T,) Σ log π of each action's tokens."""
    sums = [float(np.sum(logps, dtype=np.float64)) for logps in episode.logps]
    return np.array(sums or [0.0] * len(episode.actions), dtype=np.float64)


def _keys(episode: Episode) -> list[int]:
    """Of each step: a number of what was seen and what was done there."""
    pairs = zip(episode.observations, episode.done, strict=True)
    return [
        int.from_bytes(hashlib.blake2b(f"{o}\0{a}".encode(), digest_size=8).digest(), "big")
        % _BUCKETS
        for o, a in pairs
    ]


def _logistic(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    p: NDArray[np.float64] = np.exp(-np.logaddexp(0, -logit))
    return p
