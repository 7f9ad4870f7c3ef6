"""iStar (arXiv 2509.19199): online RL whose step rewards are learnt from the outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..advantages import istar
from ..cycle import Comparison
from ..options.methods import IStarOptions
from ..process_reward import ProcessReward
from .method import Run
from .online import GRPO

if TYPE_CHECKING:
    from ...records.episodes import Episode
    from ..config import StepAgentConfig


class IStar(GRPO):
    """GRPO's advantages of outcomes, and ω times those of the steps' learnt rewards.

    The process reward model (``learning/process_reward.py``) learns from a cycle's episodes before
    it rewards their steps. An order of these two, and passes over a cycle's pairs, are our reading.

    A step's reward is compared with the mean over all steps of its task's episodes, as the paper
    has it: of how many there are the policy decides too, so this part, unlike GRPO's, is not free
    of bias. Not the paper's: where all of a task's episodes earned the same, the model has learnt
    nothing from them, and its noise, scaled to deviation 1, would be learnt: these steps have an
    advantage of 0.
    """

    Options = IStarOptions
    options: IStarOptions
    defaults: ClassVar[Mapping[str, Any]] = {**GRPO.defaults, "beta": 0.05}
    _judge: ProcessReward
    _outcomes: tuple[Tensor, Tensor]  # of the cycle: what episodes earned, and their tasks

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        super().check(args)
        if args.fp16:
            raise ValueError(
                "fp16 must be False with method='istar', whose process reward model has no loss "
                "scaling: take bf16"
            )

    def start(self, run: Run) -> None:
        self._judge = ProcessReward(run.policy, self.args, self.options.beta)

    def credit(
        self, episodes: Sequence[Episode], comparisons: Sequence[Comparison], cycle: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Of the outcomes alone; `reflect` adds the steps' own, once they are scored."""
        returns_B = torch.tensor([sum(e.rewards) for e in episodes], dtype=torch.float64)
        self._outcomes = returns_B, torch.tensor([e.seed for e in episodes])
        return super().credit(episodes, comparisons, cycle)

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        returns_B, groups_B = self._outcomes
        figures = self._judge.fit(fresh, returns_B, groups_B, cycle)
        rewards = self._judge.rewards(fresh)
        rewards_S = torch.cat(rewards)
        lengths = [len(rewards_S) for rewards_S in rewards]
        advantages_S = istar(
            *(returns_B, rewards_S, torch.tensor([0, *lengths]).cumsum(0), groups_B),
            omega=self.options.omega,
            scale=bool(self.options.scale_advantages),
        )
        advantages_S *= torch.repeat_interleave(_differ(returns_B, groups_B), torch.tensor(lengths))
        figures["step_reward_std"] = float(rewards_S.std(correction=0))
        parts = torch.split(advantages_S.float(), lengths)
        prepared = [
            replace(c, advantages=part.numpy()) for c, part in zip(fresh, parts, strict=True)
        ]
        return prepared, figures

    def save(self, folder: Path) -> None:
        self._judge.save(folder)

    def load(self, folder: Path) -> None:
        self._judge.load(folder)


def _differ(returns_B: Tensor, groups_B: Tensor) -> Tensor:
    """(B,) bool, of the tasks whose episodes earned differently."""
    return torch.tensor([len(set(returns_B[groups_B == g].tolist())) > 1 for g in groups_B])
