"""The loss of a batch: supervised, that of implicit step rewards, or PPO's (inverse.py).

Every loss is the batch's share of that of its whole optimiser's step: sums over its own items,
divided by the counts of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import step_rewards, step_sums
from .averages import Counts
from .cycle import SCORES, StepTable
from .inverse import ppo_step_loss
from .losses import implicit_step_loss

if TYPE_CHECKING:
    from .config import StepAgentConfig


def batch_loss(
    args: StepAgentConfig,
    logps_N: Tensor,
    entropy_N: Tensor | None,
    scores: Mapping[str, Tensor],
    steps: StepTable,
    total: Counts,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss by ``args.method``, and figures whose means the cycle logs.

    Args:
        scores: of the batch: (N,) log-probs of the reference and of the policy that acted, (S,)
            advantages.
        total: what the means are over.
    """
    nll = steps.expert_nll(logps_N, total.expert_tokens)
    if args.method == "sft":
        return nll, {}
    scores = {name: scores[name].to(logps_N.device) for name in SCORES}
    if args.method == "implicit":
        loss, figures = _implicit_loss(args, logps_N, scores["ref_logps"], steps, total)
    else:
        loss, figures = ppo_step_loss(args, logps_N, entropy_N, steps, total, **scores)
    if args.sft_weight:
        loss = loss + args.sft_weight * nll
    return loss, figures | _sides(logps_N.detach(), steps)


def _implicit_loss(
    args: StepAgentConfig, logps_N: Tensor, ref_logps_N: Tensor, steps: StepTable, total: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over pairs of −log σ(r_E − r_A),  r = β (log π − log π_ref) of an action."""
    rewards_S = step_rewards(logps_N, ref_logps_N, steps.offsets, beta=args.beta)
    expert_P, agent_P = rewards_S[steps.expert_P], rewards_S[steps.agent_P]
    if not len(expert_P):
        return logps_N.sum() * 0.0, {}  # nothing was compared: a zero that is still connected
    margins_P = (expert_P - agent_P).detach()
    figures = {
        "expert_reward": expert_P.detach(),
        "agent_reward": agent_P.detach(),
        "reward_margin": margins_P,
        "reward_accuracy": (margins_P > 0).float()[~steps.same_P],
        # E over the reference's own samples of log(ref / policy) estimates KL(ref ‖ policy).
        "kl": -agent_P.detach() / args.beta,
    }
    return implicit_step_loss(expert_P, agent_P).sum() / total.pairs, figures


def _sides(logps_N: Tensor, steps: StepTable) -> dict[str, Tensor]:
    """What the policy makes of the expert's and of the agent's actions: a margin hides it."""
    logps_S, lengths_S = step_sums(logps_N, steps.offsets), steps.offsets.diff().float()
    return {
        "expert_logp": logps_S[steps.expert_S],
        "agent_logp": logps_S[~steps.expert_S],
        "expert_length": lengths_S[steps.expert_S],
        "agent_length": lengths_S[~steps.expert_S],
        "identical_pairs": steps.same_P.to(torch.float32),
    }
