"""Text environments by name: ``make("babyai:GoToLocalS6N2")``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from stepagent.envs.base import ExpertUnavailable, TextEnv

__all__ = ["ExpertUnavailable", "TextEnv", "factory", "make", "register"]

_factories: dict[str, Callable[[str], TextEnv]] = {}


def register(prefix: str, factory: Callable[[str], TextEnv]) -> None:
    """Let ``make("prefix:task")`` return ``factory("task")``; without a task it is ``""``."""
    if not prefix or ":" in prefix:
        raise ValueError(f"prefix must be a non-empty text without ':', got {prefix!r}")
    if prefix in _factories:
        raise ValueError(f"environment {prefix!r} is already registered")
    _factories[prefix] = factory


def make(name: str) -> TextEnv:
    """The environment of this name, ``prefix:task``.

    Raises ValueError for a prefix that is not registered or a task its factory does not know, and
    ImportError where the environment's own package is not installed.
    """
    return factory(name)()


def factory(name: str) -> Callable[[], TextEnv]:
    """What makes the environments of this name; worker processes are sent it, so it needs no
    registration there. Raises ValueError for a prefix that is not registered."""
    prefix, _, task = name.partition(":")
    if prefix not in _factories:
        registered = ", ".join(sorted(_factories))
        raise ValueError(f"unknown environment {name!r}: the registered ones are {registered}")
    return partial(_factories[prefix], task)


def _make_babyai(level: str) -> TextEnv:
    from stepagent.envs.babyai import BabyAITextEnv, level_id  # minigrid is an optional extra

    return BabyAITextEnv(level_id(level))


register("babyai", _make_babyai)
