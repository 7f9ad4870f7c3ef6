"""Policies in environments, from the start of an episode to its end.

The public name of `stepagent.acting.rollout`, `stepagent.acting.exploring` and
`stepagent.acting.verifying`.
"""

from .acting.exploring import (
    explore,
)
from .acting.rollout import (
    Continuations,
    continue_rollouts,
    rollout_and_query,
    run_episodes,
)
from .acting.runs import (
    own_expert,
)
from .acting.verifying import (
    verify,
)

__all__ = [
    "Continuations",
    "continue_rollouts",
    "explore",
    "own_expert",
    "rollout_and_query",
    "run_episodes",
    "verify",
]
