"""What a policy makes of each state of a trajectory, by acting from there to the end.

IPR's exploration (arXiv 2406.11176)::

    o₁ a₁ o₂ a₂ o₃ …        the trajectory
          └─ â₂ ô₃ â₃ …     replayed to o₂, then the policy's own
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.trajectory import Trajectory
from ..envs.pool import EnvFactory
from ..records.episodes import Episode
from .policies import Policy
from .rollout import continue_rollouts, env_seed, run_episodes


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
