"""AgentBoard's sub-skills (arXiv 2401.13178): success, weighted by what each task asks for.

Its score of a skill is 100 · Σ w · success / Σ w over all nine tasks. Few have all nine: here the
sums are over the tasks that were run, so a score says of which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..records.episodes import Episode
from . import success_rate

TASKS = (
    "alfworld",
    "scienceworld",
    "babyai",
    "jericho",
    "pddl",
    "webshop",
    "webarena",
    "tool-query",
    "tool-operation",
)

# 1 to 3: how much of the skill a task asks for, in the order of TASKS.
_WEIGHTS = {
    "memory": (1, 2, 1, 1, 2, 1, 3, 2, 3),
    "planning": (1, 2, 2, 3, 3, 2, 3, 2, 2),
    "world modelling": (3, 3, 2, 3, 1, 1, 3, 1, 1),
    "self-reflection": (3, 2, 2, 1, 3, 2, 2, 1, 1),
    "grounding": (2, 3, 2, 1, 3, 3, 3, 3, 3),
    "spatial navigation": (2, 2, 2, 2, 1, 1, 2, 1, 1),
}
SUFFIX = " (AgentBoard)"  # of the environments of its own logs


def board_task(environment: str) -> str | None:
    """AgentBoard's name of the task that an environment is of; None for one that it has not."""
    name = environment.removesuffix(SUFFIX).partition(":")[0]
    return name if name in TASKS else None


def success_by_task(episodes: Sequence[Episode]) -> dict[str, float]:
    """The success rate of each of AgentBoard's tasks that has an episode that ended."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        task = board_task(episode.environment)
        if task is not None and episode.crashed is None:
            groups.setdefault(task, []).append(episode)
    return {task: success_rate(groups[task]) for task in TASKS if task in groups}


def sub_skills(success: Mapping[str, float]) -> dict[str, float]:
    """Each skill's score in [0, 1], over the tasks that are given.

    Args:
        success: the rate in [0, 1] of each task, by AgentBoard's name.

    Raises:
        ValueError: for no task, a task that AgentBoard has not, and a rate outside [0, 1].
    """
    if not success:
        raise ValueError("success must have at least one of AgentBoard's tasks, got none")
    for task, rate in success.items():
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if not 0 <= rate <= 1:
            raise ValueError(f"success of {task} must lie in [0, 1], got {rate}")
    scores = {}
    for skill, weights in _WEIGHTS.items():
        own = {task: weights[TASKS.index(task)] for task in success}
        scores[skill] = sum(own[task] * rate for task, rate in success.items()) / sum(own.values())
    return scores
