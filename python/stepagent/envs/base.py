"""The interface of a text environment, in gymnasium's terms, with an expert to ask."""

from __future__ import annotations

from collections.abc import Sequence
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

    An environment may have three things more, which are used where they are:

    * ``instructions: str``: what the task is and which actions there are, for a model that was not
      trained here.
    * ``check_seed(seed)``: ValueError for a seed that it has no episode of, so that a run of many
      is refused before it begins.
    * ``prepare(seeds)``: makes what these episodes need, so that it can be made side by side.
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


def check_seeds(env: TextEnv, seeds: Sequence[int]) -> None:
    """ValueError for the first of ``seeds`` that the environment knows it has no episode of."""
    check = getattr(env, "check_seed", None)
    if check is None:
        return
    for seed in seeds:
        check(seed)


def known_action(env: TextEnv, text: str, parsed: str) -> str:
    """The environment's own action that is meant; ``parsed`` where it knows none such.

    Args:
        env: with its finite ``actions``, or else ``admissible_actions()`` at this state.
        text: as the agent wrote it; where it is an action to the letter, it is meant.
        parsed: what a format made of it; upper and lower case are one where that is unambiguous.
    """
    listed = hasattr(env, "admissible_actions") and not getattr(env, "any_case", False)
    known = env.actions or (env.admissible_actions() if listed else ())  # type: ignore[attr-defined]
    for exact in (text.strip(), parsed):
        if exact in known:
            return exact
    same = [action for action in known if action.casefold() == parsed.casefold()]
    return same[0] if len(same) == 1 else parsed
