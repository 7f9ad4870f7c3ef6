"""Rollouts and preference pairs in the files of ETO (arXiv 2403.02502).

    outputs/NAME/TASK/{id}.json   {"meta": {steps, reward, finished, success, terminate_reason,
                                   error}, "conversations": [{"from", "value"}, …]}
    pairs                         [{"id", "prompt": [turns], "chosen": [turns],
                                    "rejected": [turns]}, …]

A conversation begins with instructions and examples, which ETO's scripts leave out by their number
(`PREAMBLES`); its tasks have ids, which a table of the caller's leads to seeds of an environment.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ..data.strict_json import parse
from ..data.trajectory import OnError, Trajectory
from ..files import write_text
from .episodes import Episode

Task: TypeAlias = Literal["webshop", "sciworld", "alfworld", "intercode_sql"]
Messages: TypeAlias = list[dict[str, Any]]
Seeds: TypeAlias = Mapping[str, int] | str | os.PathLike[str]

TASKS: tuple[Task, ...] = get_args(Task)
PREAMBLES: Mapping[Task, int] = {"webshop": 10, "sciworld": 16, "alfworld": 12, "intercode_sql": 10}
"""Turns before the first observation: an instruction, "OK", and an example episode."""
_META = ("steps", "reward", "finished", "success", "terminate_reason", "error")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
_GAME = "game.tw-pddl"  # of ALFWorld, in the folder that names the game


@dataclass(frozen=True)
class PreferencePair:
    """Of two ways to go on from one state the one that is preferred.

    Attributes:
        prompt: messages of user and assistant in turn, the last one a user's.
        chosen, rejected: what follows, from an assistant's message to an assistant's.
    """

    id: str
    prompt: Messages
    chosen: Messages
    rejected: Messages

    def __post_init__(self) -> None:
        parts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        for name, messages in parts.items():
            roles = [message["role"] for message in messages]
            first, last = ("user", "user") if name == "prompt" else ("assistant", "assistant")
            if not roles or roles[0] != first or roles[-1] != last or not _in_turn(roles):
                raise ValueError(
                    f"pair {self.id!r}: {name} must be turns of user and assistant from {first} "
                    f"to {last}, got {roles}"
                )


def load_pairs(path: str | os.PathLike[str]) -> list[PreferencePair]:
    """The pairs of a file of ETO's or IPR's.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: naming the pair and the rule.
    """
    pairs = []
    for place, row in enumerate(_list_of(path)):
        name = f"{path}: item {place}"
        keys = _keys(name, row, ("id", "prompt", "chosen", "rejected"))
        parts = [messages_of(f"{name}: {key}", row[key]) for key in keys[1:]]
        pairs.append(PreferencePair(str(row["id"]), *parts))
    return pairs


def save_pairs(path: str | os.PathLike[str], pairs: Sequence[PreferencePair]) -> None:
    """Write pairs as ETO's and IPR's training reads them; `load_pairs` gives equal ones back."""
    rows = [
        {
            "id": pair.id,
            "prompt": turns_of(pair.prompt),
            "chosen": turns_of(pair.chosen),
            "rejected": turns_of(pair.rejected),
        }
        for pair in pairs
    ]
    write_json(path, rows)


def load_rollouts(
    folder: str | os.PathLike[str], *, task: Task, seeds: Seeds, on_error: OnError = "raise"
) -> list[Trajectory]:
    """The rollouts of ``outputs/NAME/TASK``, without the turns before the first observation.

    The reward is ``meta["reward"]``, None where there is none (a yes or no of ALFWorld is 1 or 0);
    their flag ``success`` says that an episode ended by itself, and is left out.

    Args:
        task: Whose layout it is; it says how many turns come before, and what the id is: of
            ALFWorld the folder of the game, which ``meta["error"]`` holds, else the file's name.
        seeds: The seed of the environment of each id, a dict or a JSON file of one.
        on_error: With "skip", files that hold no trajectory are left out, each with a warning.

    Returns:
        In the order of the files' names. A last observation is ``meta["last_observation"]``.

    Raises:
        FileNotFoundError: for a folder without such files.
        ValueError: naming the file: for an id without a seed, and for what is no rollout.
    """
    check_task(task)
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    table = seed_table(seeds)
    if task == "alfworld":
        table = {id.rsplit("/", 1)[-1]: seed for id, seed in table.items()}
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} must hold rollouts, {{id}}.json, got none")
    found = []
    for path in paths:
        try:
            found.append(_rollout(path, task, table))
        except ValueError as error:
            if on_error == "raise":
                raise
            warnings.warn(f"skipped {error}", stacklevel=2)
    return found


def save_rollouts(
    folder: str | os.PathLike[str],
    episodes: Sequence[Episode],
    *,
    task: Task,
    seeds: Seeds,
    preamble: Messages,
) -> list[Path]:
    """Write episodes as the rollouts that ETO's scripts make pairs of.

    Those that crashed have no outcome and are left out, with a warning.

    Args:
        folder: ``outputs/NAME/TASK``.
        task: Whose layout it is; with ALFWorld an id of ``seeds`` is the folder of a game, of which
            the last part is the file's name.
        seeds: The seed of each id, as in `load_rollouts`.
        preamble: What the scripts leave out: messages of user and assistant in turn, as many as
            ``PREAMBLES[task]``.

    Returns:
        The files, one an episode.

    Raises:
        ValueError: for an episode whose seed no id or several have, that has no step, or that has a
            system message, and for another number of messages before.
    """
    check_preamble(task, preamble)
    ids = ids_of(seeds)
    for id in (one for several in ids.values() for one in several):
        if task != "alfworld" and ("/" in id or "." in id):
            raise ValueError(f"an id must be a file's name without '.' and '/', got {id!r}")
    kept = [episode for episode in episodes if episode.crashed is None]
    if len(kept) < len(episodes):
        warnings.warn(
            f"{len(episodes) - len(kept)} of {len(episodes)} episodes crashed and are not written",
            RuntimeWarning,
            stacklevel=2,
        )
    told = [(id_of(ids, episode), conversation(episode)) for episode in kept]
    written = []
    for episode, (id, messages) in zip(kept, told, strict=True):
        meta = {
            "steps": len(episode.actions),
            "reward": float(sum(episode.rewards)),
            "finished": True,
            "success": episode.success,
            "terminate_reason": episode.terminate_reason,
            "error": f"{id}/{_GAME}" if task == "alfworld" else None,
        }
        path = Path(folder, f"{id.rsplit('/', 1)[-1]}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"meta": meta, "conversations": turns_of([*preamble, *messages])})
        written.append(path)
    return written


# ------------------------------------------------------------------ shared with IPR's files


def seed_table(seeds: Seeds) -> dict[str, int]:
    """The seed of each id.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for what is no table of ids and whole numbers.
    """
    table: Any = seeds
    if not isinstance(seeds, Mapping):
        table = parse_file(seeds)
    if not isinstance(table, Mapping):
        raise ValueError(f"seeds must be a table of ids and seeds, got {table!r}")
    for id, seed in table.items():
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"the seed of id {id!r} must be a whole number, got {seed!r}")
    return {str(id): seed for id, seed in table.items()}


def seed_of(table: Mapping[str, int], id: str, name: str) -> int:
    """Of an id.

    Raises:
        ValueError: where the table lacks it.
    """
    if id not in table:
        raise ValueError(
            f"{name}: id {id!r} must have a seed in the table of seeds, which has {len(table)} "
            "other ids"
        )
    return table[id]


def ids_of(seeds: Seeds) -> dict[int, list[str]]:
    """The ids of each seed."""
    ids: dict[int, list[str]] = {}
    for id, seed in seed_table(seeds).items():
        ids.setdefault(seed, []).append(id)
    return ids


def id_of(ids: Mapping[int, list[str]], episode: Episode) -> str:
    """The one id of an episode's seed.

    Raises:
        ValueError: where there is none, or several.
    """
    found = ids.get(episode.seed, [])
    if len(found) != 1:
        raise ValueError(
            f"episode {episode.id} must have a seed that one id of the table has, got {found}"
        )
    return found[0]


def conversation(episode: Episode) -> Messages:
    """What was seen and said, the last observation included.

    Raises:
        ValueError: for an episode without a step, or with a system message.
    """
    if episode.system is not None:
        raise ValueError(
            f"episode {episode.id} must be without a system message, which these files have no "
            f"place for but the preamble, got {episode.system!r}"
        )
    messages = list(episode.trajectory().messages)
    if episode.last_observation is not None:
        messages.append({"role": "user", "content": episode.last_observation})
    return messages


def messages_of(name: str, turns: Any) -> Messages:
    """Turns of ETO's (``from``, ``value``) or of IPR's (``role``, ``content``) as messages.

    Raises:
        ValueError: for anything else, naming the turn.
    """
    if not isinstance(turns, list):
        raise ValueError(f"{name} must be a list of turns, got {turns!r}")
    messages = []
    for place, turn in enumerate(turns):
        row = turn if isinstance(turn, dict) else {}
        speaker, value = row.get("from", row.get("role")), row.get("value", row.get("content"))
        if speaker not in _ROLES or not isinstance(value, str):
            raise ValueError(
                f"{name}[{place}] must have 'from' or 'role', one of {', '.join(_ROLES)}, and the "
                f"text as 'value' or 'content', got {turn!r}"
            )
        messages.append({"role": _ROLES[speaker], "content": value})
    return messages


def turns_of(messages: Messages) -> list[dict[str, str]]:
    """Messages as turns of ETO's."""
    speakers = {"user": "human", "assistant": "gpt"}
    return [{"from": speakers[m["role"]], "value": m["content"]} for m in messages]


def without_preamble(name: str, messages: Messages, count: int) -> Messages:
    """What follows the ``count`` turns that come before the first observation.

    Raises:
        ValueError: where an agent's message does not follow, or the turns are not in turn.
    """
    rest = messages[count:]
    roles = [message["role"] for message in rest]
    if len(roles) < 2 or roles[0] != "user" or not _in_turn(roles):
        raise ValueError(
            f"{name} must have turns of user and assistant after the {count} that come before the "
            f"first observation, got {roles}"
        )
    return rest


def check_task(task: Task) -> None:
    """Refuse other tasks than those whose layout is known."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def check_preamble(task: Task, preamble: Messages) -> None:
    """Refuse what the scripts would not leave out, or not all of it."""
    check_task(task)
    roles = [message["role"] for message in preamble]
    count = PREAMBLES[task]
    if roles != ["user", "assistant"] * (count // 2):
        raise ValueError(
            f"preamble must be {count} messages of user and assistant in turn for task={task!r}, "
            f"got {roles}"
        )


def reward_of(name: str, value: Any) -> float | None:
    """A reward, or None; a yes or no is 1 or 0.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def parse_file(path: str | os.PathLike[str]) -> Any:
    """The JSON of a file; ValueError with its name."""
    text = Path(path).read_bytes()
    try:
        return parse(text.decode())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON as ETO and IPR do, in one atomic step; NaN is refused."""
    write_text(path, json.dumps(value, indent=4, allow_nan=False))


def _rollout(path: Path, task: Task, table: Mapping[str, int]) -> Trajectory:
    row = parse_file(path)
    _keys(str(path), row, ("meta", "conversations"))
    meta = row["meta"]
    _keys(f"{path}: meta", meta, _META)
    id = path.name.partition(".")[0]
    if task == "alfworld":
        id = _game_of(f"{path}: meta", meta["error"])
    messages = messages_of(f"{path}: conversations", row["conversations"])
    messages = without_preamble(f"{path}: conversations", messages, PREAMBLES[task])
    told = {key: meta[key] for key in _META if key not in ("reward", "success")}
    told["seed"] = seed_of(table, id, str(path))
    if messages[-1]["role"] == "user":
        told["last_observation"] = messages.pop()["content"]
    return Trajectory(messages, reward_of(f"{path}: reward", meta["reward"]), id, told)


def _game_of(name: str, error: Any) -> str:
    """ALFWorld's id: the folder of the game, of the path that the scripts keep in ``error``."""
    parts = str(error).split("/")
    if len(parts) < 2:
        raise ValueError(f"{name}: error must be the path of ALFWorld's game, got {error!r}")
    return parts[-2]


def _list_of(path: str | os.PathLike[str]) -> list[Any]:
    rows = parse_file(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a JSON list, got a {type(rows).__name__}")
    return rows


def _keys(name: str, row: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"{name} must be an object with {', '.join(keys)}, got no {missing[0]!r}")
    return keys


def _in_turn(roles: Sequence[str]) -> bool:
    return all(a != b for a, b in itertools.pairwise(roles))
