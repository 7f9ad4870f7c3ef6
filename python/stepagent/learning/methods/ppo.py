"""PPO on step rewards: what methods share whose ``reflect`` gives the agent's steps advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ...ops import step_rewards
from ..figures import sides
from ..losses import ppo_loss
from ..options.methods import PPOOptions
from .method import SIDES, Batch, Method

if TYPE_CHECKING:
    from ..config import StepAgentConfig
    from ..cycle import StepTable


class PPOMethod(Method):
    """`stepagent.ppo_loss` of the agent's steps, less their entropy."""

    Options: ClassVar[type] = PPOOptions
    options: PPOOptions
    scores = ("ref_logps", "old_logps")
    figures: ClassVar[tuple[str, ...]] = SIDES

    def __init__(self, args: StepAgentConfig) -> None:
        super().__init__(args)
        self.entropy = self.options.entropy_coef > 0
        self.target_kl = self.options.target_kl

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        if args.kl_in == "loss" and args.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator='k1' has a gradient of mean 0 in the loss: use k2 or k3, or "
                "kl_in='reward'"
            )

    @classmethod
    def check_run(
        cls, args: StepAgentConfig, *, env: bool, reference: bool, discriminator: bool
    ) -> None:
        super().check_run(args, env=env, reference=reference, discriminator=discriminator)
        if args.kl_in == "reward" and args.kl_coef and not reference:
            raise ValueError(
                "kl_in='reward' needs a ref_model: the divergence from the policy that acted, the "
                "reference without one, is 0"
            )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's, and ``sft_weight`` times the mean −log π of the expert."""
        loss, figures = self._ppo(batch)
        if self.options.sft_weight:
            loss = loss + self.options.sft_weight * batch.nll()
        return loss, figures | sides(batch.logps.detach(), batch.steps)

    def _ppo(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        options, steps, total = self.options, batch.steps, batch.total
        agent_N, offsets_A = agents_tokens(steps)
        logps_n, old_n = batch.logps[agent_N], batch.scores["old_logps"][agent_N]
        in_loss = options.kl_in == "loss"
        loss = ppo_loss(
            logps_n,
            old_n,
            batch.scores["advantages"][~steps.expert_S],
            offsets_A,
            clip=options.clip,
            ratio=options.ratio,
            ref_logps_N=batch.scores["ref_logps"][agent_N],
            kl_coef=options.kl_coef if in_loss else 0.0,
            kl=options.kl_estimator if in_loss else "k3",
        )
        if options.ratio == "token":
            share = len(logps_n) / (total.agent_tokens or 1)
        else:
            share = (len(offsets_A) - 1) / (total.agent_steps or 1)
        loss = loss * share
        log_ratios_A = step_rewards(logps_n.detach(), old_n, offsets_A, beta=1.0)
        figures = {
            "kl": divergence(log_ratios_A),
            "clip_fraction": (log_ratios_A.expm1().abs() > options.clip).float(),
        }
        if batch.entropy is not None:
            entropy_n = batch.entropy[agent_N]
            loss = loss - options.entropy_coef * entropy_n.sum() / (total.agent_tokens or 1)
            figures["entropy"] = entropy_n.detach()
        return loss, figures


def agents_tokens(steps: StepTable) -> tuple[Tensor, Tensor]:
    """Which tokens (N,) are of the agent's A actions, and the offsets (A + 1,) of these in them."""
    lengths_S, agent_S = steps.offsets.diff(), ~steps.expert_S
    return agent_S.repeat_interleave(lengths_S), F.pad(lengths_S[agent_S].cumsum(0), (1, 0))


def divergence(log_ratios_A: Tensor) -> Tensor:
    """ρ − 1 − log ρ of each action, whose mean over the old policy's own estimates KL(old ‖ π)."""
    return log_ratios_A.expm1() - log_ratios_A
