"""Text environments by name: ``make("babyai:GoToLocalS6N2")``, or your own ``"module:Class"``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial

from stepagent.data.actions import ActionFormat, parse_action
from stepagent.envs.base import ExpertUnavailable, TextEnv

__all__ = [
    "ActionFormat",
    "ExpertUnavailable",
    "TextEnv",
    "factory",
    "make",
    "parse_action",
    "register",
    "shown_name",
]

_OWN = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<maker>[A-Za-z_]\w*)(:(?P<task>.*))?")
_NEEDED = ("name", "actions", "max_steps", "reset", "step", "expert_action", "close")


_factories: dict[str, Callable[..., TextEnv]] = {}
_splits: dict[str, tuple[str, ...]] = {}  # of those that have some


def register(prefix: str, factory: Callable[..., TextEnv], *, splits: Sequence[str] = ()) -> None:
    """Let ``make("prefix:task")`` return ``factory("task")``; without a task it is ``""``.

    Args:
        splits: The names of the parts that its episodes are split into, where they are. The factory
            is then called with one of them too, ``factory("task", "train")``: with the first where
            none is asked for.

    Raises:
        ValueError: For a prefix that is empty, holds a ":" or is taken.
    """
    if not prefix or ":" in prefix:
        raise ValueError(f"prefix must be a non-empty text without ':', got {prefix!r}")
    if prefix in _factories:
        raise ValueError(f"prefix must be a new one, got {prefix!r}, which is already registered")
    _factories[prefix] = factory
    if splits:
        _splits[prefix] = tuple(splits)


def make(name: str, split: str | None = None) -> TextEnv:
    """The environment of this name, ``prefix:task``, or ``module:Class`` or ``module:Class:task``.

    Raises ValueError for a prefix that is not registered, a task its factory does not know or a
    split it does not have, and ImportError where the environment's own package is not installed.
    """
    return factory(name, split)()


def factory(name: str, split: str | None = None) -> Callable[[], TextEnv]:
    """What makes the environments of this name; worker processes are sent it, so it needs no
    registration there. Raises ValueError for a prefix that is not registered, and for a split that
    it does not have."""
    prefix, _, task = name.partition(":")
    if prefix not in _factories:
        return _own_factory(name, split)
    splits = _splits.get(prefix, ())
    if split is not None and split not in splits:
        allowed = f"one of {', '.join(splits)}" if splits else "None"
        raise ValueError(f"split of environment {prefix!r} must be {allowed}, got {split!r}")
    chosen = [split or splits[0]] if splits else []
    return partial(_factories[prefix], task, *chosen)


def shown_name(name: str) -> str:
    """The name for records and messages: without a user and password in a server's address."""
    return re.sub(r"//[^/?]*@", "//", name)


def _own_factory(name: str, split: str | None) -> Callable[[], TextEnv]:
    """Of ``module:Class``, which is imported here so that a wrong name is an error at once."""
    own = _OWN.fullmatch(name)
    if own is None:
        registered = ", ".join(sorted(_factories))
        raise ValueError(
            f"environment must be one of {registered}, or your own module:Class, got "
            f"{shown_name(name)!r}"
        )
    _maker(own["module"], own["maker"])
    if split is not None:
        raise ValueError(
            f"split of environment {name!r} must be None, got {split!r}: register() gives it some"
        )
    return partial(_make_own, own["module"], own["maker"], own["task"])


def _maker(module: str, maker: str) -> Callable[..., TextEnv]:
    """The class, or function, of a module."""
    try:
        found = getattr(importlib.import_module(module), maker)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        registered = ", ".join(sorted(_factories))
        raise ValueError(
            f"environment must be one of {registered}, or of a module that is found here, got "
            f"{f'{module}:{maker}'!r}"
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"module {module!r} must have {maker!r} to make an environment, got none"
        ) from error
    if not callable(found):
        raise TypeError(f"{module}:{maker} must be a class or a function, got {found!r}")
    return found  # type: ignore[no-any-return]


def _make_own(module: str, maker: str, task: str | None) -> TextEnv:
    env = _maker(module, maker)(*([] if task is None else [task]))
    if lacking := [attribute for attribute in _NEEDED if not hasattr(env, attribute)]:
        raise TypeError(
            f"{module}:{maker} must make a stepagent.envs.TextEnv, what it made lacks "
            f"{', '.join(lacking)}"
        )
    return env


# Each imports its environment when it is made: what it needs is in an optional extra.


def _make_babyai(level: str) -> TextEnv:
    from stepagent.envs.babyai import BabyAITextEnv, level_id

    return BabyAITextEnv(level_id(level))


def _make_blackjack(task: str) -> TextEnv:
    from stepagent.envs.blackjack import BlackjackTextEnv

    return BlackjackTextEnv(task)


def _make_scienceworld(task: str, split: str) -> TextEnv:
    from stepagent.envs.scienceworld import ScienceWorldTextEnv

    return ScienceWorldTextEnv(task, split)


def _make_textworld(task: str) -> TextEnv:
    from stepagent.envs.textworld import TextWorldTextEnv

    return TextWorldTextEnv(task)


def _make_agentgym(address: str) -> TextEnv:
    from stepagent.envs.agentgym import AgentGymTextEnv

    return AgentGymTextEnv(address)


def _make_alfworld(task: str, split: str) -> TextEnv:
    from stepagent.envs.alfworld import ALFWorldTextEnv

    return ALFWorldTextEnv(task, split)


def _make_webshop(task: str, split: str) -> TextEnv:
    from stepagent.envs.webshop import WebShopTextEnv

    return WebShopTextEnv(task, split)


register("agentgym", _make_agentgym)
register("alfworld", _make_alfworld, splits=("train", "valid_seen", "valid_unseen"))
register("babyai", _make_babyai)
register("blackjack", _make_blackjack)
register("scienceworld", _make_scienceworld, splits=("train", "dev", "test"))
register("textworld", _make_textworld)
register("webshop", _make_webshop, splits=("train", "dev", "test"))
