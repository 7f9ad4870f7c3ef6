"""StepAgent's inverse form (arXiv 2411.03817): a discriminator's verdict rewards each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ...data.ends import ends_of
from ..cycle import Comparison
from ..explorer import ExploringReflection, check_explorer
from ..figures import reward_figures, sides
from ..inverse import InverseReflection
from ..iq import IQReflection
from ..options.methods import InverseOptions
from ..parts import StepParts
from .method import REWARDS, SIDES, Batch, Run
from .ppo import PPOMethod

if TYPE_CHECKING:
    from ..collecting import Acting
    from ..config import StepAgentConfig


class Inverse(PPOMethod):
    """Discriminators fitted once a cycle (``learning/inverse.py``), then PPO on their rewards."""

    Options = InverseOptions
    options: InverseOptions
    figures = (*REWARDS, *SIDES)
    takes_discriminator = True
    reflection: InverseReflection

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        super().check(args)
        if args.baseline != "value" and args.states == "mixed":
            raise ValueError(
                f"baseline={args.baseline!r} compares the samples of a state with each other, and "
                "states='mixed' has one at the agent's states: take baseline='value'"
            )
        if args.baseline != "value" and args.samples < 2:
            raise ValueError(
                f"baseline={args.baseline!r} compares the samples of a state with each other, got "
                f"samples={args.samples}: raise it, or take baseline='value'"
            )
        check_explorer(args)
        if args.discriminator_diversity and args.discriminators < 2:
            raise ValueError(
                f"discriminator_diversity={args.discriminator_diversity} needs discriminators >= 2 "
                f"that can differ, got {args.discriminators}"
            )
        if args.discriminator_diversity and args.reward_form == "iq":
            raise ValueError(
                f"discriminator_diversity must be 0 with reward_form='iq', whose discriminators "
                f"learn from the same trajectories, got {args.discriminator_diversity}"
            )
        if args.reward_form == "iq" and args.states != "agent":
            raise ValueError(
                "reward_form='iq' needs states='agent', as what follows an action of the agent is "
                f"judged with it, got states={args.states!r}"
            )
        if args.reward_form == "iq" and (args.action_format != "plain" or args.teacher_share):
            raise ValueError(
                "reward_form='iq' judges whole texts of rollouts that are the agent's alone: it "
                "needs action_format='plain' and teacher_share=0, got "
                f"{args.action_format!r} and {args.teacher_share}"
            )

    @classmethod
    def moving(cls, fixed_reference: bool) -> tuple[str, ...]:
        return REWARDS

    def start(self, run: Run) -> None:
        given = run.policy, self.args, run.discriminator
        if self.options.reward_form == "iq":
            self.reflection = IQReflection(*given, demonstrations=run.trunks)
            return
        parts = StepParts.of_run(self.args, run.tokenizer, ends_of(run.trunks))
        if self.options.explorer == "none":
            self.reflection = InverseReflection(*given, parts)
        else:
            self.reflection = ExploringReflection(run, self.args, parts, self.loss)

    def collect(self, acting: Acting, cycle: int) -> tuple[list[Comparison], dict[str, float]]:
        if not isinstance(self.reflection, ExploringReflection):
            return super().collect(acting, cycle)
        return acting.compared(self.reflection.explorer.acting), acting.collector.figures()

    def reflect(
        self, fresh: Sequence[Comparison], earlier: Sequence[Comparison], cycle: int
    ) -> tuple[list[Comparison], dict[str, float]]:
        return self.reflection.prepare(fresh, cycle)

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        if not len(batch.steps.expert_P):
            return {}
        rewards_S = self.reflection.rewards(comparisons, batch.steps)
        return reward_figures(rewards_S, batch.steps) | sides(batch.logps, batch.steps)

    def save(self, folder: Path) -> None:
        self.reflection.save(folder)

    def load(self, folder: Path) -> None:
        self.reflection.load(folder)
