# mypy: allow-untyped-calls
# (minigrid declares itself typed, its bot is not)
"""BabyAI (the language levels of minigrid) as text, with its planning bot as the expert.

An observation is the agent's partial 7x7 view in words from `VOCABULARY`, separated by spaces:

    mission : go to the red ball . red ball ahead 2 left 1 , walls ahead 3 left 2 right 1
    ^ first observation only       ^ each object, nearest  ^ steps to the walls in sight

Directions are the agent's own. What is level with the agent or straight ahead of it has one
direction; what it carries is listed after what it sees, as ``carrying blue key``.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
from typing import Any

try:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # its greeting goes to stdout
    import gymnasium
    import numpy as np
    from minigrid.core.actions import Actions
    from minigrid.core.constants import (
        COLOR_NAMES,
        IDX_TO_COLOR,
        IDX_TO_OBJECT,
        OBJECT_TO_IDX,
        STATE_TO_IDX,
    )
    from minigrid.envs.babyai.core.verifier import (
        GoToInstr,
        OpenInstr,
        PickupInstr,
        PutNextInstr,
    )
    from minigrid.utils.baby_ai_bot import BabyAIBot, DropSubgoal, GoNextToSubgoal
except ImportError as error:
    raise ImportError(
        f"BabyAI environments need minigrid ({error}): pip install 'stepagent[demo]'"
    ) from error

from stepagent.envs.base import ExpertUnavailable

# minigrid's seventh action, done, changes nothing and solves nothing.
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle")

INSTRUCTIONS = f"""\
You walk in a world of rooms on a grid and have to fulfil a mission. You see what lies before you: \
each object with the steps to it, ahead and to your left or right, and the steps to the walls.
The actions are: {", ".join(ACTIONS)}.
left and right turn you on the spot; forward is one step ahead; pickup takes the object right in \
front of you; drop puts down what you carry; toggle opens and closes the door or box right in \
front of you."""
"""Tells a model that was not trained on BabyAI what it may do."""

_OBJECTS = ("ball", "box", "door", "key")
_VIEW = 7
_STATES = {index: state for state, index in STATE_TO_IDX.items()}
_WORDS = """
    mission : a after and behind front go in next object of on open pick put the then to up you your
    ahead left right walls carrying nothing invalid action . ,
"""

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {*ACTIONS, *COLOR_NAMES, *STATE_TO_IDX, *_OBJECTS, *map(str, range(1, _VIEW))}
        | set(_WORDS.split())
    )
)
"""Every word of every observation and action of every level."""

_KINDS: dict[Any, str] = {
    GoToInstr: "go to",
    OpenInstr: "open",
    PickupInstr: "pick up",
    PutNextInstr: "put next to",
}

_quiet = threading.Lock()  # redirecting stdout is process-wide


def level_id(level: str) -> str:
    """The gymnasium id of a BabyAI level: ``GoToObjS6`` is ``BabyAI-GoToObjS6-v1``."""
    ids = {id.split("-")[1]: id for id in gymnasium.registry if id.startswith("BabyAI-")}
    if not level:
        raise ValueError(
            f"level of BabyAI must be given, as babyai:GoToLocal, one of {', '.join(ids)}"
        )
    if level not in ids:
        near = ", ".join(difflib.get_close_matches(level, ids, n=5, cutoff=0.3)) or "GoToLocal"
        raise ValueError(f"level of BabyAI must be a known one, for example {near}, got {level!r}")
    return ids[level]


def render_view(image: np.ndarray[Any, Any]) -> str:
    """The text of a view as minigrid encodes it: ``image[x, y] = (object, color, state)``.

    The agent stands in the middle of the last row and looks up it; what its sight does not reach
    is encoded as unseen, and not listed.
    """
    cells = image.tolist()
    middle, last = _VIEW // 2, _VIEW - 1
    seen = []
    for x in range(_VIEW):
        for y in range(_VIEW):
            text = _object(*cells[x][y])
            if text and (x, y) != (middle, last):
                ahead, side = last - y, x - middle
                place = _directions(ahead=ahead, left=-side, right=side)
                seen.append((ahead + abs(side), ahead, side, f"{text} {place}"))
    parts = [text for *_, text in sorted(seen)]
    if carried := _object(*cells[middle][last]):
        parts.append(f"carrying {carried}")
    walls = _directions(
        ahead=_steps_to_wall([cells[middle][y] for y in range(last - 1, -1, -1)]),
        left=_steps_to_wall([cells[x][last] for x in range(middle - 1, -1, -1)]),
        right=_steps_to_wall([cells[x][last] for x in range(middle + 1, _VIEW)]),
    )
    if walls:
        parts.append(f"walls {walls}")
    return " , ".join(parts) or "nothing"


def _object(kind: int, color: int, state: int) -> str:
    name = IDX_TO_OBJECT[kind]
    if name not in _OBJECTS:
        return ""
    text = f"{IDX_TO_COLOR[color]} {name}"
    return f"{_STATES[state]} {text}" if name == "door" else text


def _directions(**steps: int) -> str:
    return " ".join(f"{direction} {n}" for direction, n in steps.items() if n > 0)


def _steps_to_wall(ray: list[list[int]]) -> int:
    """1 for a wall in the first cell; 0 where the ray leaves the view or loses sight before one."""
    for steps, (kind, _, _) in enumerate(ray, start=1):
        if kind == OBJECT_TO_IDX["unseen"]:
            return 0
        if kind == OBJECT_TO_IDX["wall"]:
            return steps
    return 0


class BabyAITextEnv:
    """A BabyAI level as a `stepagent.envs.TextEnv`, by its gymnasium id.

    The reward is minigrid's: ``1 - 0.9 * steps / max_steps`` on success, otherwise 0. In ``info``,
    ``task`` is what the mission asks for: "go to", "open", "pick up", "put next to" or "sequence";
    ``difficulty`` is "hard" where that is more than one thing, as putting what one has picked up.
    ``progress`` is the share of these things that are done, however they are undone later.
    """

    actions = ACTIONS
    instructions = INSTRUCTIONS

    def __init__(self, env_id: str) -> None:
        self.name = f"babyai:{env_id.split('-')[1]}"
        self._level: Any = gymnasium.make(env_id, disable_env_checker=True).unwrapped
        # A level knows its max_steps only after a reset.
        self.reset(seed=0)
        self._over = True

    @property
    def max_steps(self) -> int:
        """Steps after which the episode is truncated; it depends on the mission in some levels."""
        return int(self._level.max_steps)

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the episode of this seed."""
        with _quiet, contextlib.redirect_stdout(None):  # levels print what they reject
            obs, _ = self._level.reset(seed=seed)
        self._over = False
        self._expert = _Expert(self._level)
        self._progress = 0.0
        self._view = render_view(obs["image"])
        mission = obs["mission"].replace(",", " ,")
        return f"mission : {mission} . {self._view}", self._info(valid=True, success=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act by one of `actions`."""
        self._require_running("step")
        if action not in ACTIONS:
            return self._invalid_step()
        move = Actions[action]
        obs, reward, terminated, truncated, _ = self._level.step(move)
        self._over = terminated or truncated
        if not self._over:
            self._expert.watch(move)
        self._view = render_view(obs["image"])
        info = self._info(valid=True, success=terminated and reward > 0)
        return self._view, float(reward), terminated, truncated, info

    def expert_action(self) -> str:
        """The bot's action; `ExpertUnavailable` where it has no plan, as for a destroyed target."""
        self._require_running("expert_action")
        return self._expert.action()

    def close(self) -> None:
        """Close the level."""
        self._level.close()

    def _invalid_step(self) -> tuple[str, float, bool, bool, dict[str, Any]]:
        # Not minigrid's done: any of its actions may complete a mission.
        self._level.step_count += 1
        self._over = self._level.step_count >= self.max_steps
        info = self._info(valid=False, success=False)
        return f"invalid action . {self._view}", 0.0, False, self._over, info

    def _info(self, *, valid: bool, success: bool) -> dict[str, Any]:
        instrs = self._level.instrs
        now = 1.0 if success else _done(instrs, self._level.carrying) / _things(instrs)
        self._progress = max(self._progress, now)
        info = {
            "valid": valid,
            "success": success,
            "progress": self._progress,
            "task": _kind(instrs),
            "difficulty": "hard" if _things(instrs) > 1 else "easy",
        }
        return info if valid else {**info, "invalid": "unknown action"}

    def _require_running(self, call: str) -> None:
        if self._over:
            raise RuntimeError(f"{call} needs a running episode of {self.name}: call reset(seed)")


def _kind(instr: Any) -> str:
    """What a mission asks for: go to, open, pick up, put next to, or several of these."""
    return "sequence" if _clauses(instr) else _KINDS[type(instr)]


def _clauses(instr: Any) -> list[tuple[Any, bool]]:
    """The clauses of a sequence instruction, each with whether it is done; otherwise none."""
    if not hasattr(instr, "instr_a"):
        return []
    return [
        (instr.instr_a, instr.a_done == "success"),
        (instr.instr_b, instr.b_done == "success"),
    ]


def _things(instr: Any) -> int:
    """How many things a mission asks for; to put one next to another is two of them."""
    if clauses := _clauses(instr):
        return sum(_things(clause) for clause, _ in clauses)
    return 2 if isinstance(instr, PutNextInstr) else 1


def _done(instr: Any, carried: Any) -> int:
    """How many of them are done in a mission that is not."""
    if clauses := _clauses(instr):
        return sum(_things(one) if done else _done(one, carried) for one, done in clauses)
    return int(isinstance(instr, PutNextInstr) and carried in instr.desc_move.obj_set)


class _Bot(BabyAIBot):
    """The bot, stopped where it would replan forever (minigrid 3.2: UnlockToUnlock, seed 4)."""

    MAX_SEARCHES = 100  # in one replan, which takes up to 10 otherwise

    def replan(self, action_taken: Actions | None = None) -> Any:
        self.bfs_counter = 0
        return super().replan(action_taken)

    def _breadth_first_search(self, *args: Any, **kwargs: Any) -> Any:
        if self.bfs_counter >= self.MAX_SEARCHES:
            raise RuntimeError(f"no plan within {self.MAX_SEARCHES} searches")
        return super()._breadth_first_search(*args, **kwargs)


class _Expert:
    """minigrid's bot, given every action the agent takes, so that it can answer at any state.

    The bot keeps a plan and repairs it after actions that were not its own. Where that fails (the
    agent opened, so destroyed, a box; it closed the door to what it had seen), a new bot starts
    from the current state and remembers nothing.
    """

    def __init__(self, level: Any) -> None:
        self._level = level
        self._bot = _Bot(level)
        self._advice = self._plan(None)

    def watch(self, taken: Actions) -> None:
        """Plan for the current state, reached by this action."""
        self._advice = self._plan(taken)
        if self._advice is None:
            self._bot = self._new_bot()
            self._advice = self._plan(None)

    def action(self) -> str:
        if self._advice is None:
            mission = self._level.mission
            raise ExpertUnavailable(f"the BabyAI bot has no plan for {mission!r} at this state")
        return self._advice

    def _plan(self, taken: Actions | None) -> str | None:
        try:
            advice = self._bot.replan(taken)
        except Exception:  # the bot's own asserts, and whatever its broken plan runs into
            return None
        return None if self._is_futile(advice) else str(advice.name)

    def _is_futile(self, advice: Actions) -> bool:
        """Whether the bot takes a lost task for done, or reaches for an object that is gone."""
        front = self._level.grid.get(*self._level.front_pos)
        nothing_to_pick_up = front is None or not front.can_pickup()
        return advice == Actions.done or (advice == Actions.pickup and nothing_to_pick_up)

    def _new_bot(self) -> _Bot:
        bot = _Bot(self._level)
        if self._level.carrying:  # a new plan assumes empty hands
            bot._process_obs()
            place = GoNextToSubgoal(bot, bot._find_drop_pos())
            bot.stack += [DropSubgoal(bot), place]
        return bot
