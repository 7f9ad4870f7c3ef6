"""ALFWorld, household tasks as TextWorld games, where its data lies on this machine.

Written from the package `alfworld` 0.4.2, whose data could not be had here: it has not been run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stepagent.envs.base import ExpertUnavailable

SPLITS = ("train", "valid_seen", "valid_unseen")


def game_files(task: str, split: str) -> list[Path]:
    """The games of a split, in the order of their paths; those of one type of task, or of all.

    They lie in ``$ALFWORLD_DATA/json_2.1.1/SPLIT/TASK-…/TRIAL/game.tw-pddl``, where the package's
    ``alfworld-download`` puts them. Movable receptacles and slices are left out, as ALFWorld does.

    Raises:
        FileNotFoundError: Where there are none, naming the folder and how to get them.
    """
    data = Path(os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")).expanduser()
    folder = data / "json_2.1.1" / split
    pattern = f"{task or '*'}-*/*/game.tw-pddl"
    games = [
        path
        for path in sorted(folder.glob(pattern))
        if not any(word in str(path.relative_to(folder)) for word in ("movable", "Sliced"))
    ]
    if not games:
        raise FileNotFoundError(
            f"no ALFWorld games {pattern} in {folder}: pip install 'alfworld', then "
            "alfworld-download, or set ALFWORLD_DATA to the folder that holds json_2.1.1"
        )
    return games


class ALFWorldTextEnv:
    """ALFWorld's games as a `stepagent.envs.TextEnv`; seed s is the split's game s.

    An action is an admissible command, to the letter. The reward, and the progress, is 1 when the
    task is done. It has no expert here: ETO's expert file holds its trajectories.
    """

    actions: tuple[str, ...] = ()
    max_steps = 40  # ETO's
    instructions = (
        "You are in a household and have to do a task.\n"
        "The actions are, with the names of things and places as you see them: go to PLACE, "
        "take OBJ from PLACE, move OBJ to PLACE, open PLACE, close PLACE, toggle OBJ, use OBJ, "
        "clean OBJ with PLACE, heat OBJ with PLACE, cool OBJ with PLACE, slice OBJ with OBJ, "
        "examine OBJ, inventory, look."
    )

    def __init__(self, task: str = "", split: str = "train") -> None:
        self._games = game_files(task, split)
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        except ImportError as error:
            raise ImportError(f"ALFWorld needs alfworld ({error}): pip install alfworld") from error
        self.name = f"alfworld:{task}" if task else "alfworld"
        self._wrappers: list[Any] = [AlfredDemangler(), AlfredInfos]
        self._infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
        self._game: Any = None
        self._over = True

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the split's game of this number: the room, and the task."""
        self.check_seed(seed)
        self.close()
        import textworld

        path = self._games[seed]
        self._game = textworld.start(str(path), self._infos, self._wrappers)
        self._state = self._game.reset()
        self._task = path.parts[-3].partition("-")[0]
        self._over, self._steps = False, 0
        return str(self._state.feedback).strip(), self._info(valid=True)

    def check_seed(self, seed: int) -> None:
        """ValueError for a seed beyond the split."""
        if not 0 <= seed < len(self._games):
            raise ValueError(f"seed of {self.name} must lie in [0, {len(self._games)}), got {seed}")

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by an admissible command; ``info["invalid"]`` is "inadmissible action"."""
        self._require_running("step")
        self._steps += 1
        valid = action in self._state.admissible_commands
        observation = "Nothing happens."
        if valid:
            self._state, _, _ = self._game.step(action)
            observation = str(self._state.feedback).strip()
        won = bool(self._state.won)
        truncated = not won and self._steps >= self.max_steps
        self._over = won or truncated
        return observation, float(won), won, truncated, self._info(valid=valid)

    def admissible_actions(self) -> list[str]:
        """Every command that the game takes now."""
        self._require_running("admissible_actions")
        return list(self._state.admissible_commands)

    def expert_action(self) -> str:
        """`ExpertUnavailable`."""
        self._require_running("expert_action")
        raise ExpertUnavailable(f"{self.name} has no expert to ask")

    def close(self) -> None:
        """Close the game."""
        self._over = True
        if self._game is not None:
            self._game.close()
            self._game = None

    def _info(self, *, valid: bool) -> dict[str, Any]:
        won = bool(self._state.won)
        info = {"valid": valid, "success": won, "progress": float(won), "task": self._task}
        return info if valid else {**info, "invalid": "inadmissible action"}

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of {self.name}: call reset(seed)")
