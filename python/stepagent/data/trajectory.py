"""Trajectories: chat messages with a reward, read from native JSONL or ETO/ShareGPT JSON.

A native file holds one JSON object a line, ``{"messages": [...], "reward", "id", "meta"}``. The
format of a file is told from its content, never from its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from ..files import write_text

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass
class Trajectory:
    """A conversation between an agent and its environment; a step is an assistant message.

    messages: non-empty list of dicts, each with ``role`` (system, user, assistant or tool) and
    ``content`` (str), at least one of them the assistant's; other keys are kept. reward: finite
    or None. id: str or None. meta: anything else, JSON to be saved.
    Raises TypeError or ValueError, naming the message and the rule.
    """

    messages: list[dict[str, Any]]
    reward: float | None = None
    id: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_messages(self.messages)
        self.reward = _finite_reward(self.reward)
        if not isinstance(self.id, str | None):
            raise TypeError(f"id is {self.id!r}; it must be a str or None")
        if not isinstance(self.meta, dict):
            raise TypeError(f"meta is {self.meta!r}; it must be a dict")

    @property
    def num_steps(self) -> int:
        """The number of assistant messages, at least 1."""
        return sum(message["role"] == "assistant" for message in self.messages)


def load_trajectories(path: str | os.PathLike[str]) -> list[Trajectory]:
    """Read the trajectories of one file, at least one.

    The file is JSONL, a JSON list or one JSON object. A record is native (it has ``messages``) or
    ETO/ShareGPT: ``conversations``, a list of ``{"from": "human" | "gpt" | "system", "value"}``,
    with an id (a number becomes a str), a reward (in ``meta`` for an ETO rollout) and other keys,
    which go to meta.

    Raises FileNotFoundError, and ValueError with ``path:line`` or ``path: item i`` and the reason:
    a directory, an empty file, invalid UTF-8, malformed JSON, an invalid trajectory.
    """
    path = Path(path)
    trajectories = []
    for where, record in _records(path, _read_text(path)):
        try:
            trajectories.append(_from_record(record))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not trajectories:
        raise ValueError(f"{path} holds no trajectories")
    return trajectories


def save_trajectories(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> None:
    """Write native JSONL in one atomic step; `load_trajectories` gives back equal trajectories.

    Raises TypeError or ValueError, before anything is written, for no trajectories and for one
    that JSON would change: NaN, tuples, keys that are not strings. Raises
    OSError where ``path`` is a device, a FIFO or a folder. A symbolic link stays one.
    """
    lines = [_to_line(index, trajectory) for index, trajectory in enumerate(trajectories)]
    if not lines:
        raise ValueError(f"no trajectories to save to {path}; an empty file cannot be loaded")
    write_text(path, "".join(lines))


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise TypeError(f"messages is a {type(messages).__name__}; it must be a list of dicts")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"none of the {len(messages)} messages is an assistant's; one must be")


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise TypeError(f"{name} is a {type(message).__name__}; it must be a dict")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{name} has no {key!r}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{name} has role {role!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise TypeError(f"{name} has content of type {type(content).__name__}; it must be a str")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no tokenizer can read
        raise ValueError(f"{name} has content that is not valid Unicode: {error}") from error


def _finite_reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, Real):
        raise TypeError(f"reward is {reward!r}; it must be a float or None")
    if not math.isfinite(reward):
        raise ValueError(f"reward is {reward!r}; it must be finite")
    return float(reward)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a directory; it must be a JSONL or JSON file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each record of the file, with the place to name in errors."""
    # "\n" alone ends a line: splitlines would also cut at the U+2028 that JSON strings may hold
    lines = text.split("\n")
    first = next(line.strip() for line in lines if line.strip())
    if first.startswith("["):
        for index, record in enumerate(_parse(path, text)):
            yield f"{path}: item {index}", record
    elif first == "{":  # one indented object
        yield str(path), _parse(path, text)
    else:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(path, line, number)


def _parse(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: column {error.colno}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}:{first_line}: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _from_record(record: Any) -> Trajectory:
    if not isinstance(record, dict):
        raise TypeError(f"a trajectory must be a JSON object, not a {type(record).__name__}")
    if "messages" in record:
        return _from_native(record)
    if "conversations" in record:
        return _from_sharegpt(record)
    raise ValueError(f"no 'messages' and no 'conversations' among the keys {sorted(record)}")


def _from_native(record: dict[str, Any]) -> Trajectory:
    known = [field.name for field in fields(Trajectory)]
    unknown = sorted(record.keys() - known)
    if unknown:
        raise ValueError(f"unknown keys {unknown}; allowed: {', '.join(known)}")
    return Trajectory(**record)


def _from_sharegpt(record: dict[str, Any]) -> Trajectory:
    rest = dict(record)
    turns, id, meta = rest.pop("conversations"), rest.pop("id", None), rest.pop("meta", {})
    if not isinstance(turns, list):
        raise TypeError(f"conversations is a {type(turns).__name__}; it must be a list of turns")
    if not isinstance(meta, dict):
        raise TypeError(f"meta is {meta!r}; it must be a dict")
    meta = {**meta, **rest}
    return Trajectory(
        messages=[_from_turn(f"conversations[{i}]", turn) for i, turn in enumerate(turns)],
        reward=meta.pop("reward", None),
        id=str(id) if isinstance(id, int) else id,
        meta=meta,
    )


def _from_turn(name: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError(f"{name} is {turn!r}; it must be an object with 'from' and 'value'")
    rest = dict(turn)
    speaker, value = rest.pop("from"), rest.pop("value")
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{name} is from {speaker!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[speaker], "content": value, **rest}


def _to_line(index: int, trajectory: Trajectory) -> str:
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectories[{index}] is a {type(trajectory).__name__}, no Trajectory")
    try:
        line = json.dumps(vars(trajectory), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"trajectories[{index}] is not JSON: {error}") from error
    if json.loads(line) != vars(trajectory):
        raise ValueError(
            f"trajectories[{index}] would come back changed: JSON has lists, not tuples, "
            "and only strings as keys"
        )
    return line + "\n"
