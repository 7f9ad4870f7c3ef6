"""The loss of a batch: supervised, that of implicit step rewards, or PPO's.

Every loss is the batch's share of that of its whole optimiser's step: sums over its own items,
divided by the counts of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import step_rewards, step_sums
from .averages import Counts
from .cycle import SCORES, StepTable
from .losses import implicit_step_loss, ppo_loss

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
        loss, figures = _ppo_step_loss(args, logps_N, entropy_N, steps, total, **scores)
    if args.sft_weight:
        loss = loss + args.sft_weight * nll
    return loss, figures | sides(logps_N.detach(), steps)


def _implicit_loss(
    args: StepAgentConfig, logps_N: Tensor, ref_logps_N: Tensor, steps: StepTable, total: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over pairs of −log σ(r_E − r_A),  r = β (log π − log π_ref) of an action."""
    rewards_S = step_rewards(logps_N, ref_logps_N, steps.offsets, beta=args.beta)
    expert_P, agent_P = rewards_S[steps.expert_P], rewards_S[steps.agent_P]
    if not len(expert_P):
        return logps_N.sum() * 0.0, {}  # nothing was compared: a zero that is still connected
    figures = {
        **reward_figures(rewards_S.detach(), steps),
        # E over the reference's own samples of log(ref / policy) estimates KL(ref ‖ policy).
        "kl": -agent_P.detach() / args.beta,
    }
    return implicit_step_loss(expert_P, agent_P).sum() / total.pairs, figures


def reward_figures(rewards_S: Tensor, steps: StepTable) -> dict[str, Tensor]:
    """The rewards of the two sides of each pair; the accuracy is over pairs that differ."""
    expert_P, agent_P = rewards_S[steps.expert_P], rewards_S[steps.agent_P]
    margins_P = expert_P - agent_P
    return {
        "expert_reward": expert_P,
        "agent_reward": agent_P,
        "reward_margin": margins_P,
        "reward_accuracy": (margins_P > 0).float()[~steps.same_P],
    }


def _ppo_step_loss(
    args: StepAgentConfig,
    logps_N: Tensor,
    entropy_N: Tensor | None,
    steps: StepTable,
    total: Counts,
    *,
    advantages: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_loss` of the agent's steps of a batch, less their entropy; and figures of each step.

    Args:
        total: what the means are over: of the batch itself, or of all that it is a part of.
        advantages: (S,) of all steps; old_logps, ref_logps: (N,) of all their tokens.
    """
    lengths_S, agent_S = steps.offsets.diff(), ~steps.expert_S
    agent_N = agent_S.repeat_interleave(lengths_S)
    offsets_A = F.pad(lengths_S[agent_S].cumsum(0), (1, 0))
    logps_n, old_n = logps_N[agent_N], old_logps[agent_N]
    in_loss = args.kl_in == "loss"
    loss = ppo_loss(
        logps_n,
        old_n,
        advantages[agent_S],
        offsets_A,
        clip=args.clip,
        ratio=args.ratio,
        ref_logps_N=ref_logps[agent_N],
        kl_coef=args.kl_coef if in_loss else 0.0,
        kl=args.kl_estimator if in_loss else "k3",
    )
    if args.ratio == "token":
        share = len(logps_n) / (total.agent_tokens or 1)
    else:
        share = (len(offsets_A) - 1) / (total.agent_steps or 1)
    loss = loss * share
    log_ratios_A = step_rewards(logps_n.detach(), old_n, offsets_A, beta=1.0)
    figures = {
        # E over the old policy's own samples of ρ − 1 − log ρ estimates KL(old ‖ π).
        "kl": log_ratios_A.expm1() - log_ratios_A,
        "clip_fraction": (log_ratios_A.expm1().abs() > args.clip).float(),
    }
    if entropy_N is not None:
        loss = loss - args.entropy_coef * entropy_N[agent_N].sum() / (total.agent_tokens or 1)
        figures["entropy"] = entropy_N[agent_N].detach()
    return loss, figures


def sides(logps_N: Tensor, steps: StepTable) -> dict[str, Tensor]:
    """What the policy makes of the expert's and of the agent's actions: a margin hides it."""
    logps_S, lengths_S = step_sums(logps_N, steps.offsets), steps.offsets.diff().float()
    return {
        "expert_logp": logps_S[steps.expert_S],
        "agent_logp": logps_S[~steps.expert_S],
        "expert_length": lengths_S[steps.expert_S],
        "agent_length": lengths_S[~steps.expert_S],
        "identical_pairs": steps.same_P.to(torch.float32),
    }
