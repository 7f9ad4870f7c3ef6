"""Online RL with credit for each step: roll out, give the agent's steps advantages, learn, repeat.

No expert is asked and nothing is imitated: a cycle's episodes earn what the environment pays. The
methods differ in what an action is compared with:

* GRPO (arXiv 2402.03300): the other episodes of the same task, by what they earned in all;
* GiGPO (arXiv 2505.10978): these, and the other steps that were taken at the same state;
* PPO (arXiv 1707.06347): the state's value, fitted as training goes (``learning/values.py``).

A baseline must not depend on the action. What the policy decides too is how many steps an episode
takes, so a task's episodes count once each, however long they are, and a baseline is never a mean
over turns by their number: that would pay or fine each further turn (verl-project/verl#7244).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...ops import step_sums
from ..advantages import gigpo, group_relative, standardised, step_gae
from ..cycle import Comparison
from ..options.choices import Anchor
from ..options.methods import GiGPOOptions, GroupOptions, OnlinePPOOptions, PPOOptions
from ..values import ValueFunction, explained
from .method import Run
from .ppo import PPOMethod

if TYPE_CHECKING:
    from ...records.episodes import Episode
    from ..collecting import Acting
    from ..config import StepAgentConfig


class Online(PPOMethod):
    """`ppo_loss` on advantages of the agent's own episodes."""

    options: PPOOptions
    explores = True
    needs_env = True
    needs_answers = False
    figures = ()
    defaults: ClassVar[Mapping[str, Any]] = {"states": "agent", "rollouts": 64}

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        super().check(args)
        rules = {
            "states": (args.states == "agent", "'agent': it learns from its own episodes"),
            "temperature": (
                args.temperature == 1,
                "1: its gradient is that of the policy that acts, and without chance there is none",
            ),
            "sft_weight": (args.sft_weight == 0, "0: its episodes hold no action of an expert"),
            "kl_in": (args.kl_in == "loss", "'loss': the reward is the environment's"),
            "ask": (args.ask == "always", "left out: no expert is asked"),
            "teacher_share": (args.teacher_share == 0, "0: no expert acts"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(
                    f"{name} must be {rule}, with method={args.method!r}, got "
                    f"{getattr(args, name)!r}"
                )

    @classmethod
    def group_size(cls, args: StepAgentConfig) -> int:
        """Episodes of one task."""
        return 1

    def collect(self, acting: Acting, cycle: int) -> tuple[list[Comparison], dict[str, float]]:
        """The cycle's episodes, group by group, with the advantage of each step.

        Raises:
            RuntimeError: where all of them crashed.
        """
        size = self.group_size(self.args)
        tasks = self.args.rollouts // size  # type: ignore[operator]
        first = self.args.rollout_seed_start + cycle * tasks
        found = acting.episodes(range(first, first + tasks), samples=size)
        episodes = [e for group in found for e in group if e.crashed is None]
        acted = [e for e in episodes if e.trunk is not None]
        if not acted:
            raise RuntimeError(
                f"an episode of cycle {cycle} must take a step, got {len(episodes)} that ended "
                f"before, of {tasks * size}; the others crashed"
            )
        made = [Comparison(*_alone(e), expert_trunk=False) for e in acted]
        advantages_S, figures = self.credit(acted, made, cycle)
        parts = torch.split(advantages_S.float(), [len(e.actions) for e in acted])
        prepared = [
            replace(c, advantages=part.numpy()) for c, part in zip(made, parts, strict=True)
        ]
        return prepared, {
            "episode_reward": float(np.mean([sum(e.rewards) for e in episodes])),
            "episode_steps": float(np.mean([len(e.actions) for e in episodes])),
            **figures,
        }

    def credit(
        self, episodes: Sequence[Episode], comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[Tensor, dict[str, float]]:
        """(S,) the advantages of all steps, in the order of the episodes, and figures to log.

        Args:
            comparisons: the same episodes, as tokens.
        """
        raise NotImplementedError


class GRPO(Online):
    """A = (R(τ) − mean) / deviation over the episodes of a task, R(τ) = Σ r; of all its steps."""

    Options: ClassVar[type] = GroupOptions
    options: GroupOptions
    defaults: ClassVar[Mapping[str, Any]] = {**Online.defaults, "scale_advantages": True}

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        super().check(args)
        size = args.group_size
        if size < 2:
            raise ValueError(
                f"group_size must be at least 2 with method={args.method!r}, which compares the "
                f"episodes of a task with each other, got {size}"
            )
        if args.rollouts % size:  # type: ignore[operator]
            raise ValueError(
                f"rollouts must be a multiple of group_size={size}, got {args.rollouts}"
            )

    @classmethod
    def group_size(cls, args: StepAgentConfig) -> int:
        return int(args.group_size)

    def credit(
        self, episodes: Sequence[Episode], comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[Tensor, dict[str, float]]:
        groups_B = torch.tensor([e.seed for e in episodes])
        earned: dict[int, list[float]] = {}
        for e in episodes:
            earned.setdefault(e.seed, []).append(sum(e.rewards))
        figures = {
            "groups": len(earned),
            "dead_groups": sum(len(set(R)) == 1 for R in earned.values()),
        }
        advantages_S, told = self._compared(*_rewards(episodes), groups_B, episodes)
        return advantages_S, figures | told

    def _compared(
        self, rewards_S: Tensor, offsets: Tensor, groups_B: Tensor, episodes: Sequence[Episode]
    ) -> tuple[Tensor, dict[str, float]]:
        returns_B = step_sums(rewards_S, offsets)
        outcome_B = group_relative(returns_B, groups_B, scale=bool(self.options.scale_advantages))
        return outcome_B.repeat_interleave(offsets.diff()), {}


class GiGPO(GRPO):
    """GRPO's, and ω (R_t − mean) over the steps at one state, R_t = Σ_{k ≥ t} γ^{k−t} r_k."""

    Options = GiGPOOptions
    options: GiGPOOptions
    defaults: ClassVar[Mapping[str, Any]] = {**Online.defaults, "scale_advantages": False}

    def _compared(
        self, rewards_S: Tensor, offsets: Tensor, groups_B: Tensor, episodes: Sequence[Episode]
    ) -> tuple[Tensor, dict[str, float]]:
        states_S = anchors(episodes, self.options.anchor)
        advantages_S = gigpo(
            *(rewards_S, offsets, groups_B, states_S),
            gamma=self.options.gamma,
            omega=self.options.omega,
            scale=bool(self.options.scale_advantages),
        )
        count_G = torch.unique(states_S, return_counts=True)[1]
        shared = float(count_G[count_G > 1].sum() / len(states_S))
        return advantages_S, {"anchored_steps": shared}


def anchors(episodes: Sequence[Episode], anchor: Anchor) -> Tensor:
    """(S,) equal numbers for the steps of a task that saw the same: now, or since it began."""
    numbers: dict[Any, int] = {}
    found = []
    for e in episodes:
        for t, observation in enumerate(e.observations):
            past = (*e.observations[:t], *e.actions[:t]) if anchor == "history" else ()
            found.append(numbers.setdefault((e.seed, observation, past), len(numbers)))
    return torch.tensor(found)


class PPO(Online):
    """Generalised advantage estimation over steps: δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    V is 0 after an episode's last step, whatever ended it. Advantages have mean 0 and deviation 1
    over a cycle.
    """

    Options = OnlinePPOOptions
    options: OnlinePPOOptions
    _values: ValueFunction

    def start(self, run: Run) -> None:
        self._values = ValueFunction(run.policy, self.args)

    def credit(
        self, episodes: Sequence[Episode], comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[Tensor, dict[str, float]]:
        rewards_S, offsets = _rewards(episodes)
        state_SH = self._values.rows(comparisons)
        values_S = self._values.values(state_SH)
        advantages_S, returns_S = step_gae(
            rewards_S, values_S, offsets, gamma=self.options.gamma, lam=self.options.gae_lambda
        )
        self._values.fit(state_SH, returns_S, cycle)
        return standardised(advantages_S), {"value_explained": explained(values_S, returns_S)}

    def save(self, folder: Path) -> None:
        self._values.save(folder)

    def load(self, folder: Path) -> None:
        self._values.load(folder)


def _alone(episode: Episode) -> tuple[Any, list[list[Any]]]:
    """An episode's tokens, and no alternative at any of its steps."""
    return episode.trunk, [[] for _ in episode.actions]


def _rewards(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """(S,) float64 what the environment paid for each step, and where episodes begin (B + 1,)."""
    rewards = [r for e in episodes for r in e.rewards]
    lengths = torch.tensor([0, *(len(e.actions) for e in episodes)])
    return torch.tensor(rewards, dtype=torch.float64), lengths.cumsum(0)
