"""Text environments by name: ``make("babyai:GoToLocalS6N2")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from stepagent.data.actions import ActionFormat, action_format, parse_action
from stepagent.envs.base import ExpertUnavailable, TextEnv

__all__ = ["ExpertUnavailable", "TextEnv", "factory", "make", "parse_action", "register"]


_factories: dict[str, Callable[..., TextEnv]] = {}
_splits: dict[str, tuple[str, ...]] = {}  # of those that have some


def register(prefix: str, factory: Callable[..., TextEnv], *, splits: Sequence[str] = ()) -> None:
    """Let ``make("prefix:task")`` return ``factory("task")``; without a task it is ``""``.

    :param splits: the names of the parts that its episodes are split into, where they are. The
        factory is then called with one of them too, ``factory("task", "train")``: with the first
        where none is asked for.
    :raises ValueError: for a prefix that is empty, holds a ":" or is taken.
    """
    if not prefix or ":" in prefix:
        raise ValueError(f"prefix must be a non-empty text without ':', got {prefix!r}")
    if prefix in _factories:
        raise ValueError(f"environment {prefix!r} is already registered")
    _factories[prefix] = factory
    if splits:
        _splits[prefix] = tuple(splits)


def make(name: str, split: str | None = None) -> TextEnv:
    """The environment of this name, ``prefix:task``.

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
        registered = ", ".join(sorted(_factories))
        raise ValueError(f"unknown environment {name!r}: the registered ones are {registered}")
    splits = _splits.get(prefix, ())
    if split is not None and split not in splits:
        has = f"it has {', '.join(splits)}" if splits else "it has none"
        raise ValueError(f"environment {prefix!r} has no split {split!r}: {has}")
    chosen = [split or splits[0]] if splits else []
    return partial(_factories[prefix], task, *chosen)


# Each imports its environment when it is made: what it needs is in an optional extra.


def _make_babyai(level: str) -> TextEnv:
    from stepagent.envs.babyai import BabyAITextEnv, level_id

    return BabyAITextEnv(level_id(level))


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
register("scienceworld", _make_scienceworld, splits=("train", "dev", "test"))
register("textworld", _make_textworld)
register("webshop", _make_webshop, splits=("train", "dev", "test"))
