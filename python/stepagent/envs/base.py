"""The interface of a text environment, in gymnasium's terms, with an expert to ask."""

from __future__ import annotations

from typing import Any, Protocol


class ExpertUnavailable(RuntimeError):
    """The environment's expert has no answer at this state."""


class TextEnv(Protocol):
    """A task observed and acted on in text.

    ``info`` holds, after ``reset`` and after every ``step``:

    * ``valid: bool``: the text was an action of this environment. A text that is not one is still a
      step: it counts against ``max_steps``, changes nothing, and the observation says so.
    * ``success: bool``: the task is done.
    * ``progress: float``: in [0, 1], never falling within an episode, 1 when the task is done.

    It may also hold what the environment knows of the episode, by which results are split:

    * ``task: str``: the task, or the kind of it, as ``boil``.
    * ``difficulty``: ``"easy"`` or ``"hard"``.
    * ``invalid: str``, only where ``valid`` is False: why, in a short text of a few kinds, as
      ``unknown action``.
    """

    @property
    def name(self) -> str:
        """The name that `stepagent.envs.make` builds this environment from."""
        ...

    @property
    def actions(self) -> tuple[str, ...]:
        """Every valid action where their set is finite, otherwise empty."""
        ...

    @property
    def max_steps(self) -> int:
        """Steps after which the current episode is truncated."""
        ...

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start this seed's episode: the first observation, which states the task, and info."""
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act: observation, reward, terminated, truncated, info. RuntimeError once it is over."""
        ...

    def expert_action(self) -> str:
        """What the expert would do now, at any state the agent has reached.

        Asking changes nothing: a second call gives the same answer. Raises `ExpertUnavailable`
        where the expert has none, and RuntimeError once the episode is over.
        """
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...
