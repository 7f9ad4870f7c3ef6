"""The episodes as the page's script reads them: a small index, and the steps in packed blocks.

The index has a list for each column of the table of episodes. The steps are only needed once an
episode is unfolded or searched, so they lie in blocks of some megabytes: JSON with every text once,
gzipped, in base64, which the browser unpacks by itself.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.metrics import METRICS
from ..records.episodes import Episode
from .divergence import Divergence, divergences
from .runs import Run

if TYPE_CHECKING:
    from ..analysis import Subgoals

_BLOCK = 2_000_000  # characters of text in a block


class _Texts:
    """Every text once; an episode refers to it by its place."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.size = 0

    def place(self, text: str | None) -> int | None:
        if text is None:
            return None
        if text not in self.places:
            self.places[text] = len(self.places)
            self.size += len(text)
        return self.places[text]

    def of(self, texts: Sequence[str | None]) -> list[int | None]:
        return [self.place(text) for text in texts]


def payload(
    runs: Sequence[Run], subgoals: Subgoals | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The index, and the blocks of steps in base64; with the phase of each state."""
    compared = [
        (number, episode, divergence)
        for number, run in enumerate(runs)
        for episode, divergence in zip(run.episodes, divergences(run, runs), strict=True)
    ]
    blocks, sizes = [], []
    shown = [(episode, divergence) for _, episode, divergence in compared]
    for packed, size in _blocks(shown, subgoals):
        blocks.append(packed)
        sizes.append(size)
    episodes = [episode for _, episode, _ in compared]
    index = {
        "runs": [run.name for run in runs],
        "blocks": sizes,
        **({} if subgoals is None else {"phases": list(subgoals.names)}),
        "scales": {
            "rewards": _scale(x for e in episodes for x in e.rewards),
            "stepRewards": _scale(x for e in episodes for x in e.step_rewards),
        },
        **_columns(compared),
    }
    return index, blocks


def _scale(rewards: Iterable[float | None]) -> float | None:
    """Where colours are full: 95 % of the rewards that are not 0 lie within. None without any."""
    sizes = [abs(reward) for reward in rewards if reward]
    return _short(float(np.quantile(sizes, 0.95))) if sizes else None


def _columns(compared: Sequence[tuple[int, Episode, Divergence | None]]) -> dict[str, list[Any]]:
    episodes = [episode for _, episode, _ in compared]
    return {
        "run": [number for number, _, _ in compared],
        # A number of JavaScript holds 53 bits.
        "seed": [e.seed if abs(e.seed) < 2**53 else str(e.seed) for e in episodes],
        **{
            name: [getattr(episode, name) for episode in episodes]
            for name in ("environment", "task", "difficulty", "split", "crashed")
        },
        **{
            name: [None if e.crashed is not None else _short(METRICS[name](e)) for e in episodes]
            for name in ("success", "reward", "progress_rate", "grounding_accuracy")
        },
        "steps": [len(episode.actions) for episode in episodes],  # of a crashed one, too
        "tokens": [None if e.trunk is None else len(e.trunk.input_ids) for e in episodes],
        "ended": [_ended(episode) for episode in episodes],
        # A step from 0; -1: the expert acts alike throughout; null: not known.
        "first_divergence": [
            None if divergence is None else -1 if divergence.step is None else divergence.step
            for _, _, divergence in compared
        ],
    }


def _ended(episode: Episode) -> str | None:
    """Why it ended, where its record says so."""
    reason = getattr(episode, "terminate_reason", None) or ("gave_up" * episode.gave_up)
    return str(reason).replace("_", " ") if reason else None


def _blocks(
    episodes: Sequence[tuple[Episode, Divergence | None]], subgoals: Subgoals | None
) -> Iterator[tuple[str, int]]:
    """Each block in base64, and how many episodes it holds."""
    texts, held = _Texts(), []
    for place, (episode, divergence) in enumerate(episodes, start=1):
        held.append(_steps(episode, divergence, texts))
        if subgoals is not None:
            held[-1]["phases"] = subgoals.phases(episode).tolist()
        if texts.size >= _BLOCK or place == len(episodes):
            block = {"texts": list(texts.places), "episodes": held}
            packed = gzip.compress(_json(block).encode(), compresslevel=6, mtime=0)
            yield base64.b64encode(packed).decode(), len(held)
            texts, held = _Texts(), []


def _steps(episode: Episode, divergence: Divergence | None, texts: _Texts) -> dict[str, Any]:
    """An episode's steps; what its record does not hold is left out."""
    found: dict[str, Any] = {
        "observations": texts.of(episode.observations),
        "actions": texts.of(episode.actions),
        "last": texts.place(episode.last_observation),
        "experts": texts.of(episode.expert_actions),
        "invalid": texts.of(episode.invalid) if any(episode.invalid) else [],
        "valid": [int(valid) for valid in episode.valid],
        "rewards": [_short(reward) for reward in episode.rewards],
        "progress": [_short(progress) for progress in episode.progress],
        "stepRewards": [_short(reward) for reward in episode.step_rewards],
        # Of an action, which is empty where it was replayed: its log-prob and number of tokens.
        "logps": [[_short(float(x.sum())), len(x)] if len(x) else None for x in episode.logps],
        "cut": [int(cut) for cut in getattr(episode, "truncated", [])],
    }
    if divergence is not None:
        found["course"] = texts.of(divergence.course)
        found["pairs"] = [list(pair) for pair in divergence.pairs]
    return {key: value for key, value in found.items() if value not in ([], None)}


def _short(value: float | None) -> float | None:
    """Five digits, which is more than the page shows."""
    return None if value is None else float(f"{value:.5g}")


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
