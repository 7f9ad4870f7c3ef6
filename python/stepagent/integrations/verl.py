"""verl's advantages and rewards by steps, as functions of tensors.

``verl_plugin.py`` registers them in verl; nothing here imports it. B responses of T tokens, of
which ``response_mask`` marks those that the policy produced: each run of them is a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..learning.advantages import group_relative, leave_one_out
from ..ops import step_gae
from .masked_steps import MaskedSteps


def step_returns(
    token_level_rewards: Tensor, response_mask: Tensor, *, index: Any, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """What came after each action, less what the other responses to the prompt got.

        A_s = Σ_{k ≥ s} γ^{k−s} r_k − mean over the others of the group of their Σ_k γᵏ r_k

    The baseline does not depend on the response it is for, so there is no bias, however many steps
    responses have. r_k is what ``token_level_rewards`` holds from the step's first token up to the
    next step.

    Args:
        token_level_rewards, response_mask: (B, T).
        index: (B,) the prompt of each response, as verl's ``uid``; two responses or more each.
        config: verl's algorithm, of which ``gamma`` is γ (1 without).

    Returns:
        (advantages, returns), (B, T) float32: each step's at all of its tokens, 0 elsewhere.

    Raises:
        ValueError: for a response without others, or a reward before the first step.
    """
    steps, rewards_S = _rewards(token_level_rewards, response_mask)
    gamma = 1.0 if config is None else config.get("gamma", 1.0)
    returns_S, _unused = step_gae(
        rewards_S, torch.zeros_like(rewards_S), steps.row_offsets, gamma=gamma, lam=1.0
    )
    acted_B = steps.row_offsets.diff() > 0
    totals_B = rewards_S.new_zeros(len(acted_B))
    totals_B[acted_B] = returns_S[steps.row_offsets[:-1][acted_B]]
    baselines_B = totals_B - leave_one_out(totals_B, _groups(index))
    advantages_S = returns_S - baselines_B.repeat_interleave(steps.row_offsets.diff())
    return steps.spread(advantages_S), steps.spread(returns_S)


def step_group_relative(
    token_level_rewards: Tensor, response_mask: Tensor, *, index: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """Each step's own reward relative to those of all steps of its prompt (iStar's step part).

    Args, Returns, Raises: as `step_returns`; no γ, and groups of one are allowed.
    """
    steps, rewards_S = _rewards(token_level_rewards, response_mask)
    groups_S = _groups(index).repeat_interleave(steps.row_offsets.diff().cpu())
    advantages = steps.spread(group_relative(rewards_S, groups_S.to(rewards_S.device)))
    return advantages, advantages


def _rewards(token_level_rewards: Tensor, response_mask: Tensor) -> tuple[MaskedSteps, Tensor]:
    steps = MaskedSteps.of(response_mask)
    return steps, steps.sums_until_next(token_level_rewards.float(), "token_level_rewards")


def _groups(index: Any) -> Tensor:
    return torch.from_numpy(np.unique(np.asarray(index), return_inverse=True)[1])


def step_scores(
    rewards: Sequence[Sequence[float]], outcomes: Sequence[float], response_mask: Tensor
) -> Tensor:
    """(B, T) float32 rewards: each step's at its last token, and the outcome at the last one's.

    Args:
        rewards: for each response one number a step.
        outcomes: (B,) the score of each response, added to its last step.
        response_mask: (B, T).

    Raises:
        ValueError: for rewards that do not fit the steps, or a response without any.
    """
    steps = MaskedSteps.of(response_mask)
    rewards_S = steps.join(rewards, "step_rewards")
    for b, count in enumerate(steps.counts_B):
        if not count:
            raise ValueError(f"response_mask[{b}] must have a token that the policy produced")
    rewards_S[steps.row_offsets[1:] - 1] += rewards_S.new_tensor(list(outcomes))
    return steps.at_ends(rewards_S)
