"""Episodes as padded arrays: what each agent, or each part of an episode, saw and did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..records.episodes import Episode
from .describing import Describe, describe_once

if TYPE_CHECKING:
    from numpy.typing import NDArray

Joint = Episode | Sequence[Episode]
"""An episode of one agent, or those of all agents that acted side by side."""

_OTHER = "other"


@dataclass(frozen=True)
class Actions:
    """The classes of actions that a decoder chooses from; the last is every other action."""

    names: tuple[str, ...]
    whole: bool  # classes are whole actions; otherwise their first words

    @classmethod
    def of(cls, actions: Sequence[str], most: int) -> Actions:
        """Whole actions where there are at most ``most`` of them, or else first words."""
        whole = len(set(actions)) <= most
        found = Counter(action if whole else _verb(action) for action in actions)
        return cls((*(name for name, _ in found.most_common(most)), _OTHER), whole)

    def index(self, actions: Sequence[str]) -> NDArray[np.int64]:
        """The class of each action."""
        places = {name: place for place, name in enumerate(self.names[:-1])}
        named = (action if self.whole else _verb(action) for action in actions)
        return np.array([places.get(name, len(places)) for name in named], dtype=np.int64)


def _verb(action: str) -> str:
    words = action.split()
    return words[0].lower() if words else ""


@dataclass(frozen=True, eq=False)
class Tracks:
    """E episodes of I local tracks of up to T steps; U different observations.

    features_UD: of each observation. texts_EIT, actions_EIT: places of the observation and of the
    class of the action at each step; 0 beyond the end, where mask_EIT is False.
    """

    features_UD: NDArray[np.float32]
    texts_EIT: NDArray[np.int64]
    actions_EIT: NDArray[np.int64]
    mask_EIT: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.mask_EIT)


def agents_of(joint: Joint) -> list[Episode]:
    """The episodes of all its agents."""
    return [joint] if isinstance(joint, Episode) else list(joint)


def done_by(episode: Episode) -> list[str]:
    """Its actions as text; "" for an answer that held none."""
    return [action or "" for action in episode.done]


def make_tracks(
    joints: Sequence[Joint], actions: Actions, describe: Describe, parts: int
) -> Tracks:
    """Arrays of episodes.

    Args:
        parts: into how many parts an episode of one agent is cut; with several agents each is one
            track.

    Raises:
        ValueError: for an episode with less steps than parts, and where the number of agents
            differs.
    """
    tracks = [_local(joint, parts) for joint in joints]
    sizes = {len(own) for own in tracks}
    if len(sizes) != 1:
        raise ValueError(f"all episodes must have one number of agents, got {sorted(sizes)}")
    texts = list(dict.fromkeys(text for own in tracks for track in own for text, _ in track))
    places = {text: place for place, text in enumerate(texts)}
    longest = max(len(track) for own in tracks for track in own)
    shape = len(tracks), sizes.pop(), longest
    texts_EIT, actions_EIT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask_EIT = np.zeros(shape, np.bool_)
    for e, own in enumerate(tracks):
        for i, track in enumerate(own):
            texts_EIT[e, i, : len(track)] = [places[text] for text, _ in track]
            actions_EIT[e, i, : len(track)] = actions.index([action for _, action in track])
            mask_EIT[e, i, : len(track)] = True
    return Tracks(describe_once(describe, texts), texts_EIT, actions_EIT, mask_EIT)


def _local(joint: Joint, parts: int) -> list[list[tuple[str, str]]]:
    agents = agents_of(joint)
    steps = [list(zip(e.observations, done_by(e), strict=True)) for e in agents]
    least = parts if len(agents) == 1 else 1
    for episode, own in zip(agents, steps, strict=True):
        if len(own) < least:
            raise ValueError(
                f"an episode must have at least {least} step{'s' if least > 1 else ''}, got "
                f"{len(own)} in {episode.id}" + (": take fewer parts" if least > 1 else "")
            )
    if len(agents) > 1:
        return steps
    bounds = np.linspace(0, len(steps[0]), parts + 1).round().astype(int)
    return [steps[0][a:b] for a, b in pairwise(bounds)]
