"""SRL (arXiv 2510.25992): at the expert's states, an action earns its likeness to the expert's.

The reward is that of the action alone, as ``action_format`` reads it: the thought before it is
free, and learns with it. With M the characters in the blocks that two actions have in common, in
order, and T the characters of both together (Python's ``difflib``, Ratcliff and Obershelp),

    r = 2 M / T in [0, 1],   r = −1 for a text that holds no action

Advantages compare the samples of a state. Where all earn the same nothing is learnt from them:
their advantages are 0. (The paper samples until a batch is full of others; here they stay in the
means. That, the −1, and comparing characters without ``difflib``'s heuristic for frequent ones in
texts of 200 and more, are our reading.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...data.actions import FORMATS
from ...data.branch import action_of, written_text
from ...data.ends import ends_of
from ..advantages import group_relative, leave_one_out
from ..cycle import Comparison
from ..figures import sides
from ..options.methods import SRLOptions
from .method import SIDES, Batch, Run
from .ppo import PPOMethod

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..config import StepAgentConfig

NO_ACTION = -1.0  # the reward of a text without an action
_ADVANTAGES = {"group": group_relative, "leave_one_out": leave_one_out}


def likeness(action: str | None, expert: str) -> float:
    """2 M / T of two actions; 1 for equal ones, ``NO_ACTION`` for None."""
    if action is None:
        return NO_ACTION
    return SequenceMatcher(None, action, expert, autojunk=False).ratio()


class SRL(PPOMethod):
    """PPO on the likeness of the agent's parsed action to the expert's."""

    Options = SRLOptions
    options: SRLOptions
    defaults: ClassVar[Mapping[str, Any]] = {"samples": 4, "baseline": "group"}
    figures = ("step_reward", *SIDES)

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        super().check(args)
        rules = {
            "states": (args.states == "expert", "'expert': elsewhere a state has one sample"),
            "samples": (args.samples > 1, "at least 2, which are compared with each other"),
            "temperature": (args.temperature > 0, "> 0: the samples of a state would be all equal"),
            "baseline": (args.baseline in _ADVANTAGES, f"one of {list(_ADVANTAGES)}"),
            "kl_in": (args.kl_in == "loss", "'loss': the reward is the likeness alone"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                value = getattr(args, name)
                raise ValueError(f"{name} must be {rule}, with method='srl', got {value!r}")

    def start(self, run: Run) -> None:
        self._tokenizer, self._ends = run.tokenizer, frozenset(ends_of(run.trunks))
        for i, trunk in enumerate(run.trunks):
            for t, (start, stop) in enumerate(trunk.action_spans):
                if self._action(trunk.input_ids[start:stop]) is None:
                    text = written_text(trunk.input_ids[start:stop], self._tokenizer, self._ends)
                    raise ValueError(
                        f"the expert's action at step {t} of train_dataset[{i}] must be one that "
                        f"action_format={self.args.action_format!r} reads, got {text!r}"
                    )

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        rewards = [state for c in fresh for state in self.rewards(c)]
        counts = [len(state) for state in rewards]
        rewards_A = torch.tensor([r for state in rewards for r in state], dtype=torch.float64)
        states_A = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        advantages_A = _ADVANTAGES[self.options.baseline](rewards_A, states_A)
        parts = iter(torch.split(advantages_A, counts))
        prepared = []
        for c in fresh:
            steps = [part for _ in c.branches for part in (np.zeros(1), next(parts).numpy())]
            prepared.append(replace(c, advantages=np.concatenate(steps).astype(np.float32)))
        return prepared, {
            "step_reward": float(rewards_A.mean()),
            "step_reward_std": float(rewards_A.std(correction=0)),
            "srl_flat_states": float(np.mean([len(set(state)) < 2 for state in rewards])),
            "srl_without_action": float((rewards_A == NO_ACTION).double().mean()),
        }

    def rewards(self, comparison: Comparison) -> list[list[float]]:
        """``[t][k]``, of each action tried; none where the expert's own cannot be read."""
        found: list[list[float]] = []
        spans = comparison.trunk.action_spans
        for (start, stop), tried in zip(spans, comparison.branches, strict=True):
            expert = self._action(comparison.trunk.input_ids[start:stop])
            if expert is None:
                found.append([])
            else:
                found.append([likeness(self._action(ids), expert) for ids in tried])
        return found

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        if not len(batch.steps.expert_P):
            return {}
        rewards = [r for c in comparisons for state in self.rewards(c) for r in state]
        return {"step_reward": torch.tensor(rewards), **sides(batch.logps, batch.steps)}

    def _action(self, ids: NDArray[np.int32]) -> str | None:
        return action_of(ids, FORMATS[self.args.action_format], self._tokenizer, self._ends)
