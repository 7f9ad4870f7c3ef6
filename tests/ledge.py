"""A walk on a ledge, by which a diagnosis can be worked out by hand."""

from __future__ import annotations

from typing import Any

from stepagent.envs import ExpertUnavailable

_MOVES = {"on": 1, "back": -1, "rest": 0, "leap": 5}


class Ledge:
    """Walk to the goal, 3 steps away, in seeds from 5 on 9 steps; an episode has 5 steps.

    A jump ends it. The expert always walks on, so it fails where the goal is 9 steps away, and does
    not know of leaps.
    """

    name = "ledge:walk"
    actions = ("on", "back", "rest", "leap", "jump")
    max_steps = 5

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self._left, self._steps = (9 if seed >= 5 else 3), 0
        return self._view(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        self._left -= _MOVES.get(action, 0)
        done = self._left <= 0
        info = self._info(action in self.actions)
        over = done or action == "jump"
        return self._view(), float(done), over, not over and self._steps >= self.max_steps, info

    def expert_action(self) -> str:
        return "on"

    def close(self) -> None:
        """Nothing to free."""

    def _view(self) -> str:
        return f"{self._left} steps left"

    def _info(self, valid: bool = True) -> dict[str, Any]:
        done = self._left <= 0
        return {"valid": valid, "success": done, "progress": float(done)}


class Expertless(Ledge):
    """Nobody knows the way."""

    name = "ledge:expertless"

    def expert_action(self) -> str:
        raise ExpertUnavailable("nobody knows")
