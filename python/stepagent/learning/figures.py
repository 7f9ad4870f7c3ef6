"""Figures of a batch that several methods log: the rewards and log-probs of both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import step_sums
from .cycle import StepTable


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
