"""An expert asked afterwards: at some states of episodes that are over, by replay.

Which states are worth an answer is known when all episodes of a cycle are. Environments give the
same states again for the same seed and actions, which is checked, so nothing is lost by waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..data.actions import ActionFormat, FormatName
from ..data.actions import action_format as as_format
from ..envs.pool import EnvFactory
from ..records.episodes import Episode
from .answers import Answer
from .askers import Asker
from .lockstep import roll_out
from .runs import Expert, Options, Start, own_expert

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..data.trajectory import Trajectory
    from ..envs.base import TextEnv


def most_worth(asker: Asker, episodes: Sequence[Episode], count: int) -> list[list[int]]:
    """Per episode the steps at which an answer is worth most to an asker, ``count`` of all.

    Of equals the first. A step at which the expert acted is none of the agent's. An episode without
    an outcome, or without tokens, has none.

    Raises:
        ValueError: where the asker does not give a finite number for each step.
    """
    chosen: list[list[int]] = [[] for _ in episodes]
    meant = [place for place, steps in enumerate(map(own_steps, episodes)) if steps]
    worths = asker.worth([episodes[place] for place in meant])
    if len(worths) != len(meant):
        raise ValueError(
            f"{type(asker).__name__}.worth must give an array for each of {len(meant)} episodes, "
            f"got {len(worths)}"
        )
    steps = []
    for place, given in zip(meant, worths, strict=True):
        episode, worth_T = episodes[place], np.asarray(given, dtype=np.float64)
        if worth_T.shape != (len(episode.actions),) or not np.isfinite(worth_T).all():
            raise ValueError(
                f"{type(asker).__name__}.worth must give a finite number for each of the "
                f"{len(episode.actions)} steps of {episode.id}, got {worth_T}"
            )
        steps += [(-float(worth_T[t]), place, t) for t in own_steps(episode)]
    for _, place, t in sorted(steps)[:count]:
        chosen[place].append(t)
    return [sorted(own) for own in chosen]


def own_steps(episode: Episode) -> list[int]:
    """The steps at which the agent acted: those that can be asked about."""
    if episode.crashed is not None or episode.trunk is None:
        return []
    taught = episode.overruled or [None] * len(episode.actions)
    return [t for t, ids in enumerate(taught) if ids is None]


def ask_where_worth(
    asker: Asker,
    episodes: Sequence[Episode],
    count: int,
    ask: Callable[[list[list[int]]], list[Episode]],
) -> tuple[list[Episode], int]:
    """The episodes with the answers at ``count`` of their steps; how many there were.

    Args:
        ask: the episodes with the answers at these steps of each, as `ask_again` gives them.
    """
    steps = most_worth(asker, episodes, count)
    asked = ask(steps)
    asker.learn(asked, steps)
    answers = sum(
        episode.expert_actions[t] is not None
        for episode, own in zip(asked, steps, strict=True)
        if episode.expert_actions
        for t in own
    )
    return asked, answers


def ask_again(
    env: str | EnvFactory,
    expert: Expert | None,
    episodes: Sequence[Episode],
    steps: Sequence[Sequence[int]],
    *,
    max_steps: int | None,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
) -> list[Episode]:
    """The episodes, with the expert's answers at these of their steps beside those they have.

    Args:
        expert: None: the environment's own.
        steps: of each episode.
        max_steps, action_format: of the run that the episodes are of. Further options:
            `stepagent.rollout.run_episodes`.

    Raises:
        ValueError: where a replay takes another course, naming the seed and the step.
    """
    wanted = [place for place, own in enumerate(steps) if own]
    meant = {(place, t) for place in wanted for t in steps[place]}

    def asks(keys: Sequence[int], now: Sequence[int]) -> NDArray[np.bool_]:
        return np.array([pair in meant for pair in zip(keys, now, strict=True)], dtype=np.bool_)

    options = Options(
        expert or own_expert,
        max_steps,
        batch_size,
        workers,
        timeout,
        action_format=as_format(action_format),
        asks=asks,
    )
    policy = _Again(episodes, [max(own, default=0) for own in steps])
    starts = [Start(episodes[place].seed, place) for place in wanted]
    again = dict(zip(wanted, roll_out(env, policy, starts, options, None), strict=True))
    for place, one in again.items():
        if one.crashed is None and len(one.actions) < (t := max(steps[place])):
            raise ValueError(
                f"{one.environment} must go on as before for the same seed and actions, but the "
                f"episode of seed {one.seed} is over before step {t}: take ask='always'"
            )
    return [
        _with_answers(episode, again[place].expert_actions if place in again else [])
        for place, episode in enumerate(episodes)
    ]


def _with_answers(episode: Episode, found: Sequence[str | None]) -> Episode:
    count = len(episode.actions)
    answers = list(found[:count]) + [None] * (count - len(found))
    before = episode.expert_actions or [None] * count
    return replace(
        episode,
        expert_actions=[b if a is None else a for a, b in zip(answers, before, strict=True)],
    )


class _Again:
    """Does in each episode what was done there, up to the last step that is asked about."""

    name = "replay"

    def __init__(self, episodes: Sequence[Episode], last: Sequence[int]) -> None:
        self._of, self._last = episodes, last
        self._rows: list[int] = []
        self._step = 0

    def begin(self, seeds: Sequence[int]) -> None:
        """The key of an episode is its place."""
        self._rows, self._step = list(seeds), 0

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """Episodes are replayed from their beginning."""
        raise NotImplementedError("a replay has no trajectory to go on from")

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[Answer | None]:
        """The recorded answers with the actions that were read in them."""
        answers = [self._answer(*pair) for pair in zip(self._rows, observations, strict=True)]
        self._step += 1
        return answers

    def keep(self, rows: Sequence[int]) -> None:
        """Forget those that are over."""
        self._rows = [self._rows[row] for row in rows]

    def _answer(self, place: int, shown: str) -> Answer | None:
        episode, t = self._of[place], self._step
        if t > self._last[place]:
            return None
        if shown != episode.observations[t]:
            raise ValueError(
                f"{episode.environment} must show the same again for the same seed and actions, "
                f"got at step {t} of seed {episode.seed} {shown!r}, and before "
                f"{episode.observations[t]!r}: take ask='always'"
            )
        action = episode.done[t]
        problem = episode.invalid[t] if action is None else None
        return Answer(episode.actions[t], problem=problem, action=action)
