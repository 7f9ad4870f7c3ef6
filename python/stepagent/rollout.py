"""Policies in environments, from the start of an episode to its end.

The public name of `stepagent.acting.rollout`.
"""

from .acting.rollout import (
    Continuations,
    continue_rollouts,
    rollout_and_query,
    run_episodes,
)
from .acting.runs import (
    own_expert,
)

__all__ = [
    "Continuations",
    "continue_rollouts",
    "own_expert",
    "rollout_and_query",
    "run_episodes",
]
