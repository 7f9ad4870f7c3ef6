"""Environments that count what training costs: steps taken, replays included, and answers asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from stepagent import envs


@dataclass
class Spent:
    """Of all environments of this process that are given it."""

    env_steps: int = 0
    expert_answers: int = 0


class Counted:
    """An environment as it is, beside the count.

    Args:
        episodes: how many a split has; seeds beyond it begin at its first one again. None: any seed
            has an episode of its own.
    """

    def __init__(self, name: str, split: str | None, episodes: int | None, spent: Spent) -> None:
        self._env, self._episodes, self._spent = envs.make(name, split), episodes, spent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def check_seed(self, seed: int) -> None:
        """As the environment's, where it has one."""
        if check := getattr(self._env, "check_seed", None):
            check(self._place(seed))

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the episode of this seed."""
        return self._env.reset(self._place(seed))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """A step, counted."""
        self._spent.env_steps += 1
        return self._env.step(action)

    def expert_action(self) -> str:
        """An answer, counted if there is one."""
        answer = self._env.expert_action()
        self._spent.expert_answers += 1
        return answer

    def _place(self, seed: int) -> int:
        return seed if self._episodes is None else seed % self._episodes


def counted(name: str, split: str | None, episodes: int | None, spent: Spent) -> Any:
    """What makes them, for ``env=``."""
    return partial(Counted, name, split, episodes, spent)
