"""StepAgent's implicit form (arXiv 2411.03817): the expert's action preferred at every step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ops import step_rewards
from ..cycle import Comparison
from ..figures import reward_figures, sides
from ..losses import implicit_step_loss
from ..options.methods import ImplicitOptions
from .method import REWARDS, SIDES, Batch, Method


class Implicit(Method):
    """Mean over pairs of −log σ(r_E − r_A),  r = β (log π − log π_ref) of an action."""

    Options = ImplicitOptions
    options: ImplicitOptions
    figures = ("loss", "kl", *REWARDS, *SIDES)

    @classmethod
    def moving(cls, fixed_reference: bool) -> tuple[str, ...]:
        return () if fixed_reference else ("loss", "kl", *REWARDS)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over pairs, and ``sft_weight`` times the mean −log π of the expert."""
        loss, figures = self._pairs(batch)
        if self.options.sft_weight:
            loss = loss + self.options.sft_weight * batch.nll()
        return loss, figures | sides(batch.logps.detach(), batch.steps)

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        if not len(batch.steps.expert_P):
            return {}
        loss, figures = self.loss(batch)
        return {"loss": loss.reshape(1), **figures}

    def _pairs(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        steps, beta = batch.steps, self.options.beta
        rewards_S = step_rewards(batch.logps, batch.scores["ref_logps"], steps.offsets, beta=beta)
        expert_P, agent_P = rewards_S[steps.expert_P], rewards_S[steps.agent_P]
        if not len(expert_P):
            return batch.logps.sum() * 0.0, {}  # nothing was compared: a zero, still connected
        figures = {
            **reward_figures(rewards_S.detach(), steps),
            # E over the reference's own samples of log(ref / policy) estimates KL(ref ‖ policy).
            "kl": -agent_P.detach() / beta,
        }
        return implicit_step_loss(expert_P, agent_P).sum() / batch.total.pairs, figures
