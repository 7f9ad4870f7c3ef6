"""Where an episode was lost: at which steps another action would have turned it into a success.

CSO's verification (arXiv 2602.03412)::

    o₁ a₁ o₂ a₂ o₃ a₃ …     a failure of the agent's
          └─ a' o' â â      another action there, and the agent itself from then on: a success?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..envs.pool import EnvFactory
from ..records.episodes import Episode
from .exploring import up_to
from .policies import Policy
from .rollout import continue_rollouts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def verify(
    policy: Policy,
    env: str | EnvFactory,
    episodes: Sequence[Episode],
    answers: Sequence[Sequence[Sequence[str]]],
    *,
    tokens: Sequence[Sequence[Sequence[NDArray[np.int32]]]] | None = None,
    samples: int = 1,
    places: Sequence[int] | None = None,
    **options: Any,
) -> list[list[list[bool]]]:
    """Whether each answer, in place of what was done there, turns a failure into a success.

    The policy goes on after it ``samples`` times, and more than half of the episodes that have an
    outcome have to succeed. In an episode that succeeded, or crashed, there is nothing to turn.

    Args:
        episodes: as the policy had them.
        answers: ``[i][t][k]``, at step t of episode i, as the run's action format writes them.
        tokens: the token ids of the answers, end of the turn included. With them a model goes on
            after the tokens that it saw and wrote itself; None: after the messages, tokenized anew.
        places: the number of each episode in the random numbers; None: its place.
        options: those of `stepagent.continue_rollouts`.

    Returns:
        ``[i][t][k]``.

    Raises:
        ValueError: for another number of steps, and as `stepagent.continue_rollouts`.
    """
    for i, (episode, steps) in enumerate(zip(episodes, answers, strict=True)):
        if len(steps) != len(episode.actions):
            raise ValueError(
                f"answers[{i}] must have those of each of the {len(episode.actions)} steps of "
                f"episode {episode.id}, got {len(steps)}"
            )
    asked = [
        (i, t, k)
        for i, steps in enumerate(answers)
        if not episodes[i].success and episodes[i].crashed is None
        for t, tried in enumerate(steps)
        for k in range(len(tried))
    ]
    found = continue_rollouts(
        policy,
        env,
        [
            up_to(episodes[i], t, answers[i][t][k], None if tokens is None else tokens[i][t][k])
            for i, t, k in asked
        ],
        samples=samples,
        steps=[[t] for _, t, _ in asked],
        places=[i if places is None else places[i] for i, *_ in asked],
        **options,
    )
    turned = [[[False] * len(tried) for tried in steps] for steps in answers]
    for (i, t, k), after in zip(asked, found, strict=True):
        outcomes = [episode.success for episode in after.episodes[0] if episode.crashed is None]
        turned[i][t][k] = 2 * sum(outcomes) > len(outcomes)
    return turned
