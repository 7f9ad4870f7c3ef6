"""On-policy distillation (GKD, arXiv 2306.13649): a teacher's word on the agent's own tokens.

The agent descends the reverse divergence from a teacher π_T, the ``ref_model``: the mean over the N
tokens that it wrote in the cycle, each after the prefix that it wrote itself, with its gradient,

    1/N Σ_n KL(π(·|n) ‖ π_T(·|n)),    1/N Σ_n E_{x ~ π(·|n)} (log π − log π_T)(x|n) ∇ log π(x|n)

The expectation is estimated by the one token that was sampled, and followed as PPO does:

    L = −1/N Σ_n min(ρ_n A_n, clip(ρ_n, 1 − ε, 1 + ε) A_n)
    A_n = log π_T − log π_old,    ρ_n = π / π_old

At π = π_old the gradient of L is an unbiased estimate of that above. How a token changes the
prefixes that come after it is not followed, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import step_rewards
from ...ops.kl import ratios_of
from ..cycle import Comparison
from ..figures import sides
from ..losses import ppo_loss
from ..options.methods import DistillationOptions
from .method import SIDES, Batch, Method
from .ppo import agents_tokens, divergence

if TYPE_CHECKING:
    from ..config import StepAgentConfig


class Distillation(Method):
    """The reverse KL to a teacher on the tokens that the agent sampled."""

    Options = DistillationOptions
    options: DistillationOptions
    scores = ("ref_logps", "old_logps")
    needs_answers = False
    figures = ("reverse_kl", *SIDES)

    def __init__(self, args: StepAgentConfig) -> None:
        super().__init__(args)
        self.target_kl = self.options.target_kl

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        if args.temperature != 1:
            raise ValueError(
                "temperature must be 1 with method='distillation', whose divergence is estimated "
                f"from the policy's own samples, got {args.temperature}"
            )

    @classmethod
    def check_run(
        cls, args: StepAgentConfig, *, env: bool, reference: bool, discriminator: bool
    ) -> None:
        super().check_run(args, env=env, reference=reference, discriminator=discriminator)
        if not reference:
            raise ValueError("method='distillation' needs a ref_model: the teacher, got None")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The divergence, and ``sft_weight`` times the mean −log π of the expert."""
        agent_N, offsets_A = agents_tokens(batch.steps)
        logps_n, old_n = batch.logps[agent_N], batch.scores["old_logps"][agent_N]
        advantages_n = batch.scores["ref_logps"][agent_N] - old_n
        each = torch.arange(len(logps_n) + 1, device=logps_n.device)  # a token is a decision
        loss = ppo_loss(logps_n, old_n, advantages_n, each, clip=self.options.clip)
        loss = loss * (len(logps_n) / (batch.total.agent_tokens or 1))
        if self.options.sft_weight:
            loss = loss + self.options.sft_weight * batch.nll()
        now_n = logps_n.detach()
        return loss, {
            "kl": divergence(step_rewards(now_n, old_n, offsets_A, beta=1.0)),
            "clip_fraction": ((now_n - old_n).expm1().abs() > self.options.clip).float(),
            "reverse_kl": reverse_kl(batch),
            **sides(batch.logps.detach(), batch.steps),
        }

    def measure(self, batch: Batch, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        if not len(batch.steps.expert_P):
            return {}
        return {"reverse_kl": reverse_kl(batch), **sides(batch.logps, batch.steps)}


def reverse_kl(batch: Batch) -> Tensor:
    """ρ (log π − log π_T) of the agent's tokens: its mean estimates KL(π ‖ π_T) of a token, at the
    prefixes of the policy that acted."""
    agent_N, _ = agents_tokens(batch.steps)
    logps_n = batch.logps.detach()[agent_N]
    old_n, teacher_n = (batch.scores[name][agent_N] for name in ("old_logps", "ref_logps"))
    return ratios_of(logps_n - old_n) * (logps_n - teacher_n)
