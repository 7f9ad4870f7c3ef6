"""Figures that are logged: of what a cycle compares, and of a batch's rewards and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.actions import FORMATS
from ..data.branch import action_agreement, agreement
from ..ops import step_sums
from .cycle import CHOSEN, REJECTED, Comparison, StepTable, naive_tokens, unique_tokens

if TYPE_CHECKING:
    from .config import StepAgentConfig


def collected_figures(
    comparisons: Sequence[Comparison], args: StepAgentConfig, tokenizer: Any
) -> dict[str, float]:
    """Of what a cycle compares; the agreement only where anything was tried at a trunk's states."""
    figures: dict[str, float] = {}
    if any(tried for c in comparisons for tried in c.branches):
        compared = [c.trunk for c in comparisons], [c.branches for c in comparisons]
        reading: Any = {"form": FORMATS[args.action_format], "tokenizer": tokenizer}
        figures["agreement"] = agreement(*compared, **reading)
        # Beside identical_pairs, which in the plain format are of tokens.
        figures["identical_actions"] = action_agreement(*compared, **reading)
    return figures | {
        "expert_answers": sum(c.expert_answers for c in comparisons),
        "tokens_unique": unique_tokens(comparisons, args.max_tokens),
        "tokens_naive": naive_tokens(comparisons),
    }


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


def trajectory_figures(rewards_S: Tensor, logps_N: Tensor, steps: StepTable) -> dict[str, Tensor]:
    """Of the pairs of trajectories: rewards, log-probs and tokens of each side's own steps."""
    logps_S, lengths_S = step_sums(logps_N, steps.offsets), steps.offsets.diff().float()
    figures = {}
    for name, side in (("chosen", CHOSEN), ("rejected", REJECTED)):
        figures[f"{name}_reward"] = steps.side_sums(rewards_S, side)
        figures[f"{name}_logp"] = steps.side_sums(logps_S, side)
        figures[f"{name}_length"] = steps.side_sums(lengths_S, side)
    margins_K = figures["chosen_reward"] - figures["rejected_reward"]
    return figures | {"reward_margin": margins_K, "reward_accuracy": (margins_K > 0).float()}
