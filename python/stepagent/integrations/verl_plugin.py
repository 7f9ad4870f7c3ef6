"""What verl loads by the entry point ``verl.plugins``, in each of its workers (verl 0.9.1).

algorithm.adv_estimator=stepagent_returns | stepagent_group
actor_rollout_ref.actor.policy_loss.loss_mode=stepagent_step | stepagent_implicit
reward.reward_manager.name=stepagent
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

from . import verl as steps
from .policy_losses import implicit_losses, step_losses

register_adv_est("stepagent_returns")(steps.step_returns)
register_adv_est("stepagent_group")(steps.step_group_relative)


@register_policy_loss("stepagent_step")  # type: ignore[untyped-decorator]
def step_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """`stepagent.integrations.policy_losses.step_losses`, aggregated as verl aggregates."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    losses_BT, clipped_BT = step_losses(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
    )
    share = clipped_BT.sum() / response_mask.sum().clamp(min=1)
    loss = _aggregate(losses_BT, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, {"actor/pg_clipfrac": share.item()}


@register_policy_loss("stepagent_implicit")  # type: ignore[untyped-decorator]
def implicit_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """`stepagent.integrations.policy_losses.implicit_losses`; β is ``policy_loss.ppo_kl_coef``."""
    losses_BT, rewards_BT = implicit_losses(
        old_log_prob, log_prob, advantages, response_mask, beta=config.policy_loss.ppo_kl_coef
    )
    loss = _aggregate(losses_BT, response_mask, loss_agg_mode, config, rollout_is_weights)
    right = (rewards_BT * advantages > 0).float()[response_mask.bool()]
    return loss, {"actor/implicit_accuracy": right.mean().item()}


def _aggregate(
    losses_BT: Tensor, mask_BT: Tensor, mode: str, config: Any, weights_BT: Tensor | None
) -> Tensor:
    if weights_BT is not None:
        losses_BT = losses_BT * weights_BT
    loss: Tensor = agg_loss(losses_BT, mask_BT, mode, **config.global_batch_info)
    return loss


@register("stepagent")
class StepRewardManager(NaiveRewardManager):  # type: ignore[misc]
    """verl's own rule-based manager, with the step rewards that a rollout recorded.

    ``step_rewards`` of the non-tensor batch holds for each response a list of one number a step, as
    an agent loop returns it in ``extra_fields``.
    """

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Tensor:
        """(B, T): each step's reward at its last token, the score at the last step's."""
        rewards = data.non_tensor_batch.get("step_rewards")
        if rewards is None:
            raise ValueError(
                "step_rewards must be in the batch: an agent loop returns them in extra_fields, "
                f"got {sorted(data.non_tensor_batch)}"
            )
        mask_BT = data.batch["response_mask"]
        return steps.step_scores(list(rewards), [float(score) for score in scores], mask_BT)
