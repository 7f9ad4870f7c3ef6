"""Losses of a policy by steps, for hosts that hold log-probs as (B, T) and average over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_positive
from ..ops import step_rewards, step_sums
from ..ops.kl import ratios_of
from .masked_steps import MaskedSteps


def step_losses(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective with an action as one decision (`stepagent.ppo_loss`).

        ℓ_s = −min(ρ_s A_s, clip(ρ_s, 1 − ε_low, 1 + ε_high) A_s),  ρ_s = exp Σ (log π − log π_old)

    Args:
        old_log_prob, log_prob, advantages, response_mask: (B, T); A_s is the mean over its tokens.

    Returns:
        (losses, clipped), (B, T): ℓ_s at each of its tokens, 0 elsewhere, as a host that
        averages over tokens takes it; and 1 where the ratio was clipped.
    """
    steps, advantages_S = _advantages(advantages, response_mask)
    new_N, old_N = steps.tokens(log_prob), steps.tokens(old_log_prob)
    ratios_S = ratios_of(step_rewards(new_N, old_N, steps.step_offsets, beta=1.0))
    free_S = -ratios_S * advantages_S
    clipped_S = -ratios_S.clamp(1 - clip_low, 1 + clip_high) * advantages_S
    losses_S = torch.maximum(free_S, clipped_S)
    return steps.spread(losses_S), steps.spread((clipped_S > free_S).float())


def implicit_losses(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """StepAgent's implicit reward of each action, told apart by the sign of its advantage.

        ℓ_s = |A_s| · −log σ(sign(A_s) r_s),  r_s = β Σ (log π − log π_old)

    The expert's actions have A > 0 and the agent's A < 0. Hosts shuffle and cut batches, so
    the two are not held against each other but each against r = 0, as in PRIME's loss of outcomes.

    Args:
        old_log_prob, log_prob, advantages, response_mask: as `step_losses`.
        beta: β > 0.

    Returns:
        (losses, rewards), (B, T): ℓ_s and r_s at each token of the step, 0 elsewhere.
    """
    check_positive("beta", beta)
    steps, advantages_S = _advantages(advantages, response_mask)
    new_N, old_N = steps.tokens(log_prob), steps.tokens(old_log_prob)
    rewards_S = step_rewards(new_N, old_N, steps.step_offsets, beta=beta)
    losses_S = advantages_S.abs() * -F.logsigmoid(advantages_S.sign() * rewards_S)
    return steps.spread(losses_S), steps.spread(rewards_S.detach())


def _advantages(advantages: Tensor, response_mask: Tensor) -> tuple[MaskedSteps, Tensor]:
    steps = MaskedSteps.of(response_mask)
    sums_S = step_sums(steps.tokens(advantages.float()), steps.step_offsets)
    return steps, sums_S / steps.step_offsets.diff()
