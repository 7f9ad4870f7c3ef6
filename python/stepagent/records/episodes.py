"""The record of an episode, and its one format on disk: a trajectory line of JSONL.

What can be trained on is the trajectory itself; all that an evaluation knows beside it is in its
``meta``, per step a list of T. What a record does not hold is absent there, and empty or None here.

    messages  (system,) user o_0, assistant a_0, user o_1, …, assistant a_T-1
    meta      last_observation: o_T
              rewards, progress, valid, invalid, expert_actions, step_rewards: T each
              action_format; taken, truncated: T each, where an answer is more than its action
              token_ids (L), action_spans (T, 2), rewinds (K, 2; where there are any),
              logps (T, tokens of the action), made_with (hashes of the tokenizer and of its chat
              template): a local model's
              cycle: that it was acted in, of a trainer's (records/cycle_file.py)
              overruled: T each, token ids or null, where the expert acted in the agent's place
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.trajectory import Trajectory, load_trajectories
from ..data.trunk import Trunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

_REQUIRED = ("environment", "seed", "success")
_LABELS = ("policy", "split", "task", "difficulty")  # str or None, always written
_PER_STEP = ("rewards", "progress", "valid", "invalid")
# Written only where there are any, or where they say something.
_PER_STEP_ASKED = ("expert_actions", "step_rewards", "taken", "truncated")
_TOLD = ("crashed", "gave_up", "terminate_reason", "action_format", "measured")

TerminateReason = Literal[
    "terminated", "truncated", "max_steps", "context_limit", "gave_up", "crashed"
]
"""Why an episode ended: the environment ended it, or its own step limit did; the run's
``max_steps``; the next prompt does not fit the model; the policy had no action; it crashed."""


@dataclass
class Episode:
    """What happened in one episode, step by step; of one that crashed, the steps before.

    system: the first message to the model, where there was one.
    actions: the agent's answers, as it wrote them. taken: what their action format read in them,
    which went to the environment; None for an answer without an action, which did not. Empty where
    each answer is its action.
    truncated: the answer was cut at the token limit.
    invalid: what was wrong with an action that is not valid, where the environment says so; for an
    answer without an action, why it has none.
    expert_actions: what the expert would have done; None where it had no answer.
    step_rewards: of a method, for the actions taken; None where there is none.
    logps: per action the policy's log-prob of each of its tokens (fp32, at temperature 1); empty
    for an action that was replayed, or that is the expert's.
    measured: metrics that another tool wrote down without what they are of, by name.
    overruled: the token ids of what the agent would have done, at the steps at which the expert
    acted in its place, and None at the others; empty where it never did.
    """

    environment: str
    seed: int
    policy: str | None = None
    split: str | None = None
    task: str | None = None
    difficulty: str | None = None  # "easy" or "hard"
    observations: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    valid: list[bool] = field(default_factory=list)
    invalid: list[str | None] = field(default_factory=list)
    expert_actions: list[str | None] = field(default_factory=list)  # empty unless queried
    step_rewards: list[float | None] = field(default_factory=list)
    last_observation: str | None = None  # what followed the last action
    success: bool = False
    trunk: Trunk | None = None  # of a model's episode that ended: its token ids as sampled
    logps: list[NDArray[np.float32]] = field(default_factory=list)  # with a trunk
    overruled: list[NDArray[np.int32] | None] = field(default_factory=list)  # with a trunk
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # of a model's episode
    made_with: dict[str, str] = field(default_factory=dict)  # with a trunk: whose ids it has
    crashed: str | None = None  # what happened to its environment, or to its policy
    gave_up: bool = False  # the policy had no action, as an expert without an answer
    system: str | None = None
    taken: list[str | None] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    action_format: str = "plain"  # its name
    terminate_reason: TerminateReason | None = None
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """``environment/seed``."""
        return f"{self.environment}/{self.seed}"

    def trajectory(self) -> Trajectory:
        """The episode as chat messages, all else in ``meta``; `of` gives the same back.

        One that crashed has no reward, and the reason in ``meta["crashed"]``. Raises ValueError
        where it took no step.
        """
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for observation, action in zip(self.observations, self.actions, strict=True):
            messages.append({"role": "user", "content": observation})
            messages.append({"role": "assistant", "content": action})
        if not self.actions:
            raise ValueError(
                f"episode {self.id} must have taken a step to become a trajectory, got none"
            )
        return Trajectory(
            messages=messages,
            reward=sum(self.rewards) if self.crashed is None else None,
            id=self.id,
            meta=self._meta(),
            chat_template_kwargs=dict(self.chat_template_kwargs),
        )

    def _meta(self) -> dict[str, Any]:
        always = ("environment", "policy", "seed", "split", "task", "difficulty", "success")
        meta = {name: getattr(self, name) for name in (*always, *_PER_STEP, "last_observation")}
        told = {name: getattr(self, name) for name in (*_PER_STEP_ASKED, *_TOLD)}
        meta |= {name: value for name, value in told.items() if value and value != "plain"}
        if self.trunk is not None:
            meta["token_ids"] = self.trunk.input_ids.tolist()
            meta["action_spans"] = self.trunk.action_spans.tolist()
            if len(self.trunk.rewinds):
                meta["rewinds"] = self.trunk.rewinds.tolist()
            meta["logps"] = [logps.tolist() for logps in self.logps]
            if self.overruled:
                meta["overruled"] = [i if i is None else i.tolist() for i in self.overruled]
            if self.made_with:
                meta["made_with"] = dict(self.made_with)
        return meta

    @property
    def done(self) -> list[str | None]:
        """What was done at each step: `taken`, or the answers where each is its action."""
        return list(self.taken) if self.taken else list(self.actions)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Episode:
        """The episode of a trajectory: the inverse of `trajectory`.

        Keys of ``meta`` that are no part of an episode are passed over, and those that an older
        file lacks stay empty. Raises ValueError, naming trajectory and key, where a trajectory
        does not hold its environment, seed and success, or a list has another length than T.
        """
        name, meta, T = f"trajectory {trajectory.id!r}", trajectory.meta, trajectory.num_steps
        system, turns = split_system(trajectory)
        roles = [message["role"] for message in turns]
        if roles != ["user", "assistant"] * T:
            raise ValueError(f"{name} roles must be user, assistant in turn, got {roles}")
        for key in _REQUIRED:
            if key not in meta:
                raise ValueError(
                    f"{name} must be a record of an episode, with {key!r} in its meta, got none"
                )
        lists = {key: meta.get(key) or [] for key in (*_PER_STEP, *_PER_STEP_ASKED)}
        logps = [np.array(step, dtype=np.float32) for step in meta.get("logps", [])]
        overruled = [
            ids if ids is None else np.array(ids, dtype=np.int32)
            for ids in meta.get("overruled", [])
        ]
        for key, values in {**lists, "logps": logps, "overruled": overruled}.items():
            if not isinstance(values, list) or len(values) not in (0, T):
                raise ValueError(
                    f"{name}: {key!r} in meta must have a value for each of the {T} steps, or "
                    f"none, got {values!r}"
                )
        contents = [message["content"] for message in turns]
        labels = (*_REQUIRED, *_LABELS, "last_observation", *_TOLD)
        trunk = None
        if "token_ids" in meta:
            trunk = Trunk(meta["token_ids"], meta["action_spans"], meta.get("rewinds", []))
        told: dict[str, Any] = {key: meta[key] for key in labels if key in meta}
        told |= {key: list(values) for key, values in lists.items()}
        return cls(
            observations=contents[::2],
            actions=contents[1::2],
            trunk=trunk,
            logps=logps,
            overruled=overruled,
            chat_template_kwargs=dict(trajectory.chat_template_kwargs),
            made_with=dict(meta.get("made_with") or {}),
            system=system,
            **told,
        )


def split_system(trajectory: Trajectory) -> tuple[str | None, list[dict[str, Any]]]:
    """The system message that a trajectory begins with, or None, and its turns."""
    first, *rest = trajectory.messages
    if first["role"] == "system":
        return str(first["content"]), rest
    return None, list(trajectory.messages)


def load_episodes(path: str | os.PathLike[str]) -> list[Episode]:
    """The episodes of a file that ``stepagent evaluate`` or ``collect`` wrote, in its order.

    Raises as `stepagent.load_trajectories` and `Episode.of`.
    """
    return [Episode.of(trajectory) for trajectory in load_trajectories(path)]
