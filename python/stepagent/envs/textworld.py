"""TextWorld: text games made from a seed, with the game's own winning policy as the expert."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

try:
    import textworld
    from textworld import EnvInfos, GameOptions
except ImportError as error:
    raise ImportError(
        f"TextWorld environments need textworld ({error}): pip install 'stepagent[textworld]'"
    ) from error

from stepagent.envs.base import ExpertUnavailable
from stepagent.files import cache_folder

SIZES = {
    "easy": {"rooms": 3, "objects": 6, "quest": 4},
    "hard": {"rooms": 10, "objects": 20, "quest": 10},
}
"""The named sizes. ``quest`` is the number of actions that the quest takes."""

INSTRUCTIONS = """\
You play a text game: you walk through rooms and have to reach the goal that is stated first.
The actions are, with the names of things as you see them: look, inventory, examine OBJ, \
go north, go south, go east, go west, take OBJ, take OBJ from OBJ, drop OBJ, put OBJ on OBJ, \
insert OBJ into OBJ, open OBJ, close OBJ, unlock OBJ with OBJ, lock OBJ with OBJ, eat OBJ."""
"""Tells a model that was not trained on TextWorld what it may do."""

_SEEDS = 2**32  # numpy's
_PARALLEL = 8  # games made at once, at most
_ABANDONED = (
    3600.0  # seconds after which a game that is being made was given up; it takes about one
)
_HARD_QUEST = 6  # a quest of this many actions or more is called hard; our own line
_INFOS = EnvInfos(
    feedback=True,
    description=True,
    objective=True,
    admissible_commands=True,
    policy_commands=True,
    score=True,
    max_score=True,
    won=True,
    lost=True,
)


def parse_size(task: str) -> dict[str, int]:
    """The rooms, objects and quest of ``"easy"``, ``"hard"`` or ``"rooms=5,quest=6"``.

    What is not given is as in easy. Raises ValueError for anything else.
    """
    size = dict(SIZES.get(task or "easy", SIZES["easy"]))
    if task in ("", *SIZES):
        return size
    for part in task.split(","):
        key, _, number = part.partition("=")
        if key not in size or not re.fullmatch("[1-9][0-9]*", number):
            raise ValueError(
                f"size of TextWorld must be {' or '.join(SIZES)} or, for example, "
                f"rooms=3,objects=6,quest=4, got {task!r}"
            )
        size[key] = int(number)
    return size


def make_game(path: Path, size: dict[str, int], seed: int) -> str:
    """Write the game of this size (as `parse_size` gives it) and seed; its file."""
    options = GameOptions()
    options.nb_rooms = size["rooms"]
    options.nb_objects = size["objects"]
    options.quest_length = size["quest"]
    options.seeds = seed
    options.path = str(path)
    textworld.make(options)
    return str(path)


def game_folder() -> Path:
    """Where games are kept: ``$STEPAGENT_CACHE/textworld``, or else in the user's cache folder.

    A game depends on TextWorld's version, its size and its seed, by which it is named.
    """
    return cache_folder() / "textworld" / str(textworld.__version__)


def kept_game(folder: Path, size: dict[str, int], seed: int) -> str:
    """The game's file, made where it is not kept; in one step, so that it is whole or not there.

    Args:
        folder: `game_folder`, as whoever asks sees it: a process that makes games may have been
            started under another environment.
    """
    kept = _kept(folder, size, seed)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{seed}-", dir=kept.parent))
        try:
            make_game(making / "game.z8", size, seed)
            making.rename(kept)
        except OSError:
            if not kept.exists():  # by another process, meanwhile
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return str(kept / "game.z8")


def _kept(folder: Path, size: dict[str, int], seed: int) -> Path:
    return folder / "-".join(f"{key}{number}" for key, number in size.items()) / str(seed)


def _remove_abandoned(folder: Path) -> None:
    """What processes that were killed had begun to make."""
    for making in folder.glob("*/.*"):
        try:
            if time.time() - making.stat().st_mtime > _ABANDONED:
                shutil.rmtree(making, ignore_errors=True)
        except FileNotFoundError:
            pass  # it was finished, or removed by another


def start_game(path: str, infos: EnvInfos) -> Any:
    """The game of this file, in TextWorld's own interpreter with a fixed seed."""
    with warnings.catch_warnings():
        # What jericho cannot tell of a game is not asked of it.
        warnings.filterwarnings("ignore", "Game .* is not fully supported")
        game = textworld.start(path, request_infos=infos)
    game.seed(0)
    return game


class TextWorldTextEnv:
    """TextWorld's games of one size as a `stepagent.envs.TextEnv`; seed s is the game of seed s.

    An action is one of the game's admissible commands, to the letter; other texts do not reach the
    game. The reward is the share of the game's maximum score that an action earns.
    ``info["progress"]`` is the share of the winning policy at the start that is no longer needed.
    """

    actions: tuple[str, ...] = ()  # they depend on the state
    max_steps = 100
    instructions = INSTRUCTIONS

    def __init__(self, task: str = "") -> None:
        self._size = parse_size(task)
        self.name = f"textworld:{task}" if task else "textworld"
        _remove_abandoned(game_folder())
        self._game: Any = None
        self._over = True

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the game of this seed: its objective, and the first room."""
        if self._game is not None:
            self._game.close()
        self.check_seed(seed)
        self._game = start_game(kept_game(game_folder(), self._size, seed), _INFOS)
        self._state = self._game.reset()
        self._over, self._steps, self._score, self._progress = False, 0, 0.0, 0.0
        self._policy_length = len(self._state.policy_commands)
        first = f"{self._state.objective}\n\n{_clean(self._state.description)}"
        return first, self._info(valid=True)

    def check_seed(self, seed: int) -> None:
        """ValueError for a seed that TextWorld does not take."""
        if not 0 <= seed < _SEEDS:
            raise ValueError(f"seed of {self.name} must lie in [0, {_SEEDS}), got {seed}")

    def prepare(self, seeds: Sequence[int]) -> None:
        """Make the games of these seeds that are not kept, some at once."""
        folder = game_folder()
        missing = [seed for seed in seeds if not _kept(folder, self._size, seed).exists()]
        at_once = min(len(missing), os.cpu_count() or 1, _PARALLEL)
        if at_once < 2 or multiprocessing.current_process().daemon:
            return  # each is made when its episode begins
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(at_once, mp_context=context) as makers:
            list(makers.map(partial(kept_game, folder, self._size), missing))

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by an admissible command; ``info["invalid"]`` is "inadmissible action"."""
        self._require_running("step")
        self._steps += 1
        valid, reward = action in self._state.admissible_commands, 0.0
        if valid:
            self._state, _, _ = self._game.step(action)
            observation = _clean(self._state.feedback)
            score = self._state.score / self._state.max_score
            reward, self._score = score - self._score, score
        else:
            observation = "You cannot do that here: it is not an admissible command."
        terminated = bool(self._state.won or self._state.lost)
        truncated = not terminated and self._steps >= self.max_steps
        self._over = terminated or truncated
        return observation, reward, terminated, truncated, self._info(valid=valid)

    def expert_action(self) -> str:
        """The next command of a winning policy; `ExpertUnavailable` where the game is lost."""
        self._require_running("expert_action")
        if not self._state.policy_commands:
            raise ExpertUnavailable(f"the game of {self.name} cannot be won from this state")
        return str(self._state.policy_commands[0])

    def admissible_actions(self) -> list[str]:
        """Every command that the game takes now."""
        self._require_running("admissible_actions")
        return list(self._state.admissible_commands)

    def close(self) -> None:
        """Close the game. Its files are kept for the next run."""
        self._over = True
        if self._game is not None:
            self._game.close()
            self._game = None

    def _info(self, *, valid: bool) -> dict[str, Any]:
        won = bool(self._state.won)
        left = len(self._state.policy_commands)
        if won:
            self._progress = 1.0
        elif left:  # none where the game cannot be won any more
            self._progress = max(self._progress, 1.0 - left / self._policy_length)
        info = {
            "valid": valid,
            "success": won,
            "progress": self._progress,
            "task": ",".join(f"{key}={number}" for key, number in self._size.items()),
            "difficulty": "hard" if self._size["quest"] >= _HARD_QUEST else "easy",
        }
        return info if valid else {**info, "invalid": "inadmissible action"}

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of {self.name}: call reset(seed)")


def _clean(text: str) -> str:
    """Without the interpreter's prompt and status line, and without runs of empty lines."""
    text = re.sub(r"\n>.*\Z", "", f"\n{text}", flags=re.DOTALL)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
