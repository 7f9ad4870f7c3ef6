"""What environments answer, checked: anything may come from someone's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

_REQUIRED = ("valid", "success", "progress")
_LABELS = ("task", "difficulty", "invalid")


class BadAnswer(ValueError):
    """An environment answered what no `stepagent.envs.TextEnv` does."""


def checked_reset(answer: Any) -> tuple[str, dict[str, Any]]:
    """What ``reset`` answered; `BadAnswer` where it is none."""
    observation, info = _parts("reset", answer, "observation, info")
    return _text("reset", observation), _info("reset", info, required=False)


def checked_step(answer: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """What ``step`` answered; `BadAnswer` where it is none."""
    names = "observation, reward, terminated, truncated, info"
    observation, reward, *ended, info = _parts("step", answer, names)
    info = _info("step", info, required=True)
    return (
        _text("step", observation),
        _number("step", "reward", reward),
        *(_flag("step", n, v) for n, v in zip(("terminated", "truncated"), ended, strict=True)),
        info,
    )  # type: ignore[return-value]


def _parts(call: str, answer: Any, names: str) -> Sequence[Any]:
    count = len(names.split(", "))
    if not isinstance(answer, tuple | list) or len(answer) != count:
        got = f"{len(answer)} values" if isinstance(answer, tuple | list) else repr(answer)[:80]
        raise BadAnswer(f"{call} must give {names}: {count} values, got {got}")
    return answer


def _text(call: str, observation: Any) -> str:
    if not isinstance(observation, str):
        raise BadAnswer(f"{call} must give a str as observation, got {repr(observation)[:80]}")
    try:
        observation.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no tokenizer and no file takes
        raise BadAnswer(f"{call} must give valid Unicode as observation: {error}") from error
    return str(observation)


def _scalar(value: Any) -> Any:
    """What numpy, torch and others hold as an array of one element, as Python's own."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return value


def _number(call: str, name: str, value: Any) -> float:
    value = _scalar(value)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise BadAnswer(f"{call} must give a finite number as {name}, got {value!r}")
    return float(value)


def _flag(call: str, name: str, value: Any) -> bool:
    value = _scalar(value)
    if not isinstance(value, bool | int) or value not in (True, False):
        raise BadAnswer(f"{call} must give True or False as {name}, got {value!r}")
    return bool(value)


def _info(call: str, info: Any, *, required: bool) -> dict[str, Any]:
    """As it came, its known keys checked; those of ``reset`` need not be there."""
    if not isinstance(info, dict):
        raise BadAnswer(f"{call} must give a dict as info, got {repr(info)[:80]}")
    missing = [key for key in _REQUIRED if key not in info] if required else []
    if missing:
        raise BadAnswer(
            f"{call} must give an info with {', '.join(missing)}, got {repr(info)[:80]}"
        )
    checked = dict(info)
    for key in ("valid", "success"):
        if key in info:
            checked[key] = _flag(call, f"info[{key!r}]", info[key])
    if "progress" in info:
        progress = _number(call, "info['progress']", info["progress"])
        if not 0.0 <= progress <= 1.0:
            raise BadAnswer(f"{call} must give an info['progress'] in [0, 1], got {progress}")
        checked["progress"] = progress
    for key in _LABELS:
        if not isinstance(info.get(key), str | None):
            raise BadAnswer(f"{call} must give a str as info[{key!r}], got {info[key]!r}")
    return checked
