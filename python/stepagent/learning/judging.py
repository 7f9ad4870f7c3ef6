"""How well discriminators judge: figures of their logits over the steps of a cycle.

S steps, E discriminators.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .cycle import StepTable

_PINNED, _FLAT = 0.99, 0.01  # a collapse: the accuracy, and the deviation of the rewards in nats

_logger = logging.getLogger(__name__)


def accuracy(logits_ES: Tensor, steps: StepTable) -> float:
    """How often the discriminators together are right, half of the weight on either side.

    A logit of 0 is half right; so is any on a pair whose two actions are the same.
    """
    mean_S = logits_ES.mean(0)
    agent, expert = (mean_S[side].sign().mean() for side in (steps.agent_P, steps.expert_P))
    return float((agent - expert) / 4 + 0.5)


def calibration_error(logits_ES: Tensor, steps: StepTable, bins: int = 10) -> float:
    """Expected calibration error of D = P(agent | s, a) over the pairs' actions.

    Σ_b n_b / n · |mean D − share of the agent's| over bins of equal width (arXiv 1706.04599).
    """
    D_S = torch.sigmoid(logits_ES).mean(0)
    D_K = torch.cat([D_S[steps.agent_P], D_S[steps.expert_P]])
    agent_K = torch.arange(len(D_K)) < len(steps.agent_P)
    bin_K = (D_K * bins).long().clamp(max=bins - 1)
    gap_B = torch.zeros(bins, dtype=D_K.dtype).index_add(0, bin_K, D_K - agent_K.to(D_K))
    return float(gap_B.abs().sum() / len(D_K))


def collapsed(figures: dict[str, float], cycle: int) -> float:
    """1.0, with a warning, where the discriminators separate all actions but reward them alike."""
    pinned = figures["discriminator_accuracy"] >= _PINNED
    if not (pinned and figures["step_reward_std"] <= _FLAT):
        return 0.0
    _logger.warning(
        "cycle %d: the discriminator has collapsed. It is right about %.1f %% of the actions and "
        "its rewards differ by no more than %.2g nats (standard deviation), so they teach nothing: "
        "raise discriminator_smoothing or discriminator_penalty, or lower critic_epochs or "
        "critic_learning_rate",
        *(cycle, 100 * figures["discriminator_accuracy"], figures["step_reward_std"]),
    )
    return 1.0
