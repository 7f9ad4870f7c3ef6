"""Who acts in which of a cycle's rollouts, where several policies share one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np

from ..ranks import over_ranks
from ..records.episodes import Episode

# Inside the block that it opens, the model acts as one of them.
As: TypeAlias = Callable[[], AbstractContextManager[None]]


def in_turn(
    actors: Sequence[As],
    rolled_out: Callable[[list[int]], list[Episode]],
    count: int,
    *,
    alike: bool,
) -> list[Episode]:
    """Rollouts in the order of their places, which the actors take in turn.

    By episode and not by step: a dialogue's prefix is one policy's own, and computed once.
    """
    found: dict[int, Episode] = {}
    for turn, acting in enumerate(actors):
        places = range(turn, count, len(actors))

        def own(some: list[int], places: range = places) -> list[Episode]:
            return rolled_out([places[i] for i in some])

        with acting():
            found |= zip(places, over_ranks(own, np.ones(len(places)), alike=alike), strict=True)
    return [found[place] for place in range(count)]
