"""What a run of episodes is given: where each begins, whom it asks, who acts, and its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from ..data.actions import PLAIN, ActionFormat
from ..data.draws import check_count, uniforms
from ..data.trajectory import Trajectory
from ..envs.base import ExpertUnavailable, TextEnv
from ..envs.pool import expert_actions
from ..records.episodes import Episode, split_system
from .policies import Policy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Expert = Callable[[TextEnv], str]
# Of the keys of episodes and their steps: which of them are meant, (B,) bool.
Asks = Callable[[Sequence[int], Sequence[int]], "NDArray[np.bool_]"]


def own_expert(env: TextEnv) -> str:
    """The environment's own expert; of those in workers, all are asked at once."""
    return env.expert_action()


def answers_of(expert: Expert, envs: Sequence[TextEnv]) -> list[str | None]:
    """The answers of an expert, one environment after the other; None for none."""
    if expert is own_expert:
        return expert_actions(envs)
    answers: list[str | None] = []
    for env in envs:
        try:
            answer: object = expert(env)
        except ExpertUnavailable:
            answers.append(None)  # recorded as unanswered, counted by the caller
            continue
        if not isinstance(answer, str):
            raise TypeError(
                f"the expert's answer in {env.name} must be a str, or ExpertUnavailable where "
                f"it has none, got {answer!r}"
            )
        answers.append(answer)
    return answers


@dataclass(frozen=True)
class Start:
    """Where an episode begins for the policy: at its first observation, or after some actions."""

    seed: int  # the environment's
    key: int  # of the policy's random numbers
    trajectory: Trajectory | None = None
    steps: int = 0  # actions of the trajectory to be replayed
    name: str = ""

    def content(self, turn: int) -> str:
        """Of a turn of the trajectory, after the system message if it has one."""
        assert self.trajectory is not None
        return str(split_system(self.trajectory)[1][turn]["content"])

    def check_shown(self, step: int, shown: str | None) -> None:
        """ValueError where a replay shows another observation before an action than the trajectory
        has; None: it was over before."""
        assert self.trajectory is not None
        name = f"{self.name} ({self.trajectory.id!r}), step {step}"
        if shown is None:
            raise ValueError(f"{name}: replayed, the episode of seed {self.seed} is over before")
        if shown != self.content(2 * step):
            raise ValueError(
                f"{name}: replayed with seed {self.seed}, the environment shows {shown!r}, but "
                f"the trajectory has {self.content(2 * step)!r}"
            )

    def check_system(self, policy: Policy) -> None:
        """ValueError where the policy is given another system message than the trajectory's."""
        if self.trajectory is None:
            return
        own, given = split_system(self.trajectory)[0], getattr(policy, "system", None)
        if own != given:
            roles = [message["role"] for message in self.trajectory.messages]
            raise ValueError(
                f"{self.name} ({self.trajectory.id!r}) must have user and assistant in "
                f"turn, after the system message of the policy, {given!r}, got {roles} with the "
                f"system message {own!r}"
            )


@dataclass(frozen=True)
class Teacher:
    """At a share of the steps what the expert answers is done, in place of what the policy does.

    Attributes:
        share: the probability of each step, DAgger's β (Ross et al. 2011).
        seed: of the random numbers that decide, which depend on it, on the episode and on the step.
        tokens: the token ids of the text of an action.
    """

    share: float
    seed: int
    tokens: Callable[[str], NDArray[np.int32]]

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"teacher_share must be in [0, 1], got {self.share}")

    def acts(self, keys: Sequence[int], steps: Sequence[int]) -> NDArray[np.bool_]:
        """Whether it acts at these steps of the episodes with these keys."""
        # Apart from the draws of a step's tokens, whose places in the answer begin at 0.
        decided: NDArray[np.bool_] = uniforms(self.seed, keys, steps, -1) < self.share
        return decided


@dataclass(frozen=True)
class Options:
    """Those of `stepagent.rollout.run_episodes`."""

    expert: Expert | None
    max_steps: int | None
    batch_size: int
    workers: int
    timeout: float | None
    split: str | None = None
    on_end: Callable[[Episode], None] | None = None
    action_format: ActionFormat = PLAIN
    teacher: Teacher | None = None  # needs an expert, and a policy of `Dialogues`
    asks: Asks | None = None  # where the expert is asked; None: everywhere

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps)
        if not isinstance(self.workers, Integral) or self.workers < 0:
            raise ValueError(f"workers must be a whole number >= 0, got {self.workers!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {self.timeout}")
