"""Trajectories: chat messages with a reward, read from whatever tools write.

A native file holds one JSON object a line, ``{"messages": [...], "reward", "id", "meta", "tools",
"chat_template_kwargs"}``.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias

from ..files import write_text
from .arguments import check_arguments
from .dialects import fields_of
from .messages import ROLES as ROLES
from .messages import is_plain, is_step, normalize
from .rows import Source, rows_of

OnError: TypeAlias = Literal["raise", "skip"]  # of a row that is no trajectory


@dataclass
class Trajectory:
    """A conversation between an agent and its environment; a step is a scored assistant message.

    Args:
        messages: Non-empty list of dicts with ``role`` (system, developer, user, assistant or
            tool) and ``content``. Kept in one form: content a str (lists of text parts are
            joined; "" for an assistant that only calls or thinks), thoughts in
            ``reasoning_content``, calls in OpenAI's ``tool_calls`` with arguments as dicts, and
            ``loss`` False in an assistant's message that is state only. Other keys are kept.
        reward: Finite or None.
        id: Or None.
        meta: Anything else, JSON to be saved.
        tools: What the agent could call, in the form ``apply_chat_template`` takes; or None.
        chat_template_kwargs: For the chat template, as ``{"enable_thinking": False}``; those of
            the run that it does not name apply too.

    Raises:
        TypeError, ValueError: Naming the message and the rule.
    """

    messages: list[dict[str, Any]]
    reward: float | None = None
    id: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.messages = _checked_messages(self.messages)
        self.reward = _finite_reward(self.reward)
        if not isinstance(self.id, str | None):
            raise TypeError(f"id must be a str or None, got {self.id!r}")
        if not isinstance(self.meta, dict):
            raise TypeError(f"meta must be a dict, got {self.meta!r}")
        check_arguments(self.chat_template_kwargs)
        _check_tools(self.tools)

    @property
    def num_steps(self) -> int:
        """The number of assistant messages that are scored, at least 1."""
        return len(self.step_indices)

    @property
    def step_indices(self) -> list[int]:
        """Where in ``messages`` the scored ones are, ascending."""
        return [index for index, message in enumerate(self.messages) if is_step(message)]


@dataclass(frozen=True)
class Skipped:
    """A row that is no trajectory, or cannot be encoded: where it stands, and why."""

    where: str
    reason: str


def as_trajectory(row: Trajectory | Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row, in any of the forms that docs/data.md lists.

    Args:
        row: A JSON object of a file, a row of a dataset, or a `Trajectory`, which stays itself.

    Raises:
        TypeError, ValueError: Naming the key or the message, and the rule.
    """
    found = _trajectories_of(row)
    if len(found) != 1:
        raise ValueError(
            f"the row holds {len(found)} trajectories, and must hold one: load_trajectories([row]) "
            "gives all"
        )
    return found[0]


def iterate_trajectories(
    source: Source, *, split: str | None = None, name: str = "rows"
) -> Iterator[tuple[str, Trajectory | Skipped]]:
    """Each trajectory of a source with its place there; a `Skipped` for a row that is none.

    Takes and raises what `load_trajectories` does, except for bad rows; ``name`` is that of
    a source that is no file, in places.
    """
    for where, row in rows_of(source, split, name):
        try:
            if isinstance(row, ValueError):
                raise row
            for trajectory in _trajectories_of(row):
                yield where, trajectory
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = str(error)
            yield where, Skipped(where, reason.removeprefix(f"{where}: "))


def load_trajectories(
    source: Source,
    *,
    split: str | None = None,
    on_error: OnError = "raise",
) -> list[Trajectory]:
    """Read the trajectories of a file, a dataset or a list of rows; at least one.

    Args:
        source: A path (JSONL, JSON or Parquet, by its content), a ``datasets.Dataset`` or
            ``DatasetDict``, or an iterable of rows. docs/data.md lists the forms of a row.
        split: Which of a ``DatasetDict``; it may be left out where there is one.
        on_error: With "skip", rows that are no trajectory are left out, each with a
            `UserWarning` that names place and reason.

    Raises:
        FileNotFoundError: For a file that is not there.
        ImportError: For Parquet without pyarrow.
        ValueError: With ``path:line``, ``path: item i`` or ``rows[i]`` and the reason: a directory,
            an empty file, invalid UTF-8, malformed JSON, an invalid trajectory.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    trajectories = []
    skipped = None
    for where, found in iterate_trajectories(source, split=split):
        if isinstance(found, Trajectory):
            trajectories.append(found)
            continue
        skipped = f"{where}: {found.reason}"
        if on_error == "raise":
            raise ValueError(skipped)
        warnings.warn(f"skipped {skipped}", stacklevel=2)
    if not trajectories:
        name = source if isinstance(source, str | os.PathLike) else "the source"
        raise ValueError(f"{name} holds no trajectories" + (f": {skipped}" if skipped else ""))
    return trajectories


def save_trajectories(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> None:
    """Write native JSONL in one atomic step; `load_trajectories` gives back equal trajectories.

    Raises TypeError or ValueError, before anything is written, for no trajectories and for one
    that JSON would change: NaN, tuples, keys that are not strings. Raises
    OSError where ``path`` is a device, a FIFO or a folder. A symbolic link stays one.
    """
    lines = [_to_line(index, trajectory) for index, trajectory in enumerate(trajectories)]
    if not lines:
        raise ValueError(f"trajectories must hold at least one to save to {path}, got none")
    write_text(path, "".join(lines))


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise TypeError(f"messages must be a list of dicts, got a {type(messages).__name__}")
    checked = [
        message if is_plain(message) else normalize(f"messages[{index}]", message)
        for index, message in enumerate(messages)
    ]
    if any(map(is_step, checked)):
        return checked
    if any(message["role"] == "assistant" for message in checked):
        raise ValueError("an assistant message must be scored, got loss flags that say no in all")
    raise ValueError(f"a message must be an assistant's, got none among {len(messages)}")


def _check_tools(tools: Any) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not tools:
        raise TypeError(f"tools must be a non-empty list of dicts, or None, got {tools!r}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"tools[{index}] must be a dict with 'type': 'function' and a 'function' that has "
                f"a name, got {tool!r}"
            )


def _finite_reward(reward: Any) -> float | None:
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, Real):
        raise TypeError(f"reward must be a float or None, got {reward!r}")
    if not math.isfinite(reward):
        raise ValueError(f"reward must be finite, got {reward!r}")
    return float(reward)


def _trajectories_of(row: Any) -> list[Trajectory]:
    if isinstance(row, Trajectory):
        return [row]
    if hasattr(row, "model_dump"):  # a Trace of verifiers, with all digits of its log-probs
        row = row.model_dump(mode="json", context={"float_decimals": None})
    return [Trajectory(**fields) for fields in fields_of(row)]


def _to_line(index: int, trajectory: Trajectory) -> str:
    if not isinstance(trajectory, Trajectory):
        raise TypeError(
            f"trajectories[{index}] must be a Trajectory, got a {type(trajectory).__name__}"
        )
    try:
        line = json.dumps(vars(trajectory), allow_nan=False)
        same = json.loads(line) == vars(trajectory)
    except (TypeError, ValueError) as error:
        raise type(error)(f"trajectories[{index}] is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"trajectories[{index}] must be nested less deeply") from error
    if not same:
        raise ValueError(
            f"trajectories[{index}] would come back changed: JSON has lists, not tuples, "
            "and only strings as keys"
        )
    return line + "\n"
