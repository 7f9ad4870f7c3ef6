"""What a policy makes of each state of a trajectory, by acting from there to the end.

IPR's exploration (arXiv 2406.11176)::

    o₁ a₁ o₂ a₂ o₃ …        the trajectory
          └─ â₂ ô₃ â₃ …     replayed to o₂, then the policy's own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..data.trajectory import Trajectory
from ..envs.pool import EnvFactory
from ..records.episodes import Episode
from .policies import Policy
from .rollout import continue_rollouts, env_seed, run_episodes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def explore(
    policy: Policy,
    env: str | EnvFactory,
    trajectories: Sequence[Trajectory],
    *,
    places: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[list[Episode]]:
    """``episodes[i][t]``: the first t actions of ``trajectories[i]``, then the policy's to the end.

    Args:
        trajectories: as `stepagent.continue_rollouts` takes them.
        places: the number of each trajectory in the random numbers; None: its place.
        options: those of `stepagent.rollout.run_episodes` on batches, workers and limits, and on
            the action format.

    Raises:
        ValueError: as `stepagent.continue_rollouts`.
    """
    seeds = [env_seed(i, trajectory) for i, trajectory in enumerate(trajectories)]
    whole = run_episodes(env, policy, seeds, progress="explore" if progress else None, **options)
    later = continue_rollouts(
        policy,
        env,
        trajectories,
        samples=1,
        steps=[range(trajectory.num_steps - 1) for trajectory in trajectories],
        places=places,
        progress=progress,
        **options,
    )
    return [
        [first, *(episode for (episode,) in rest.episodes)]
        for first, rest in zip(whole, later, strict=True)
    ]


def up_to(
    episode: Episode, step: int, answer: str | None = None, ids: NDArray[np.int32] | None = None
) -> Trajectory:
    """The trajectory of an episode up to and including a step, to be continued.

    Args:
        answer: what is done at this step; None: what was.
        ids: the token ids of ``answer``, end of the turn included. Without them all is tokenized
            anew, as there is no record of the answer.
    """
    trajectory, trunk = episode.trajectory(), episode.trunk
    own = trajectory.messages[: len(trajectory.messages) - 2 * (len(episode.actions) - step) + 1]
    said = episode.actions[step] if answer is None else answer
    meta: dict[str, Any] = {"seed": episode.seed}
    if trunk is not None and (answer is None or ids is not None):
        start, stop = trunk.action_spans[step].tolist()
        last = trunk.input_ids[start:stop] if ids is None else ids
        meta |= {
            "token_ids": [*trunk.input_ids[:start].tolist(), *last.tolist()],
            "action_spans": [*trunk.action_spans[:step].tolist(), [start, start + len(last)]],
            "rewinds": trunk.rewinds[trunk.rewinds[:, 0] <= start].tolist(),
        }
        if episode.made_with:
            meta["made_with"] = dict(episode.made_with)
    messages = [*own, {"role": "assistant", "content": said}]
    return replace(trajectory, messages=messages, reward=None, meta=meta)
