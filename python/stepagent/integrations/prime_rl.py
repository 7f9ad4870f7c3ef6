"""Losses by steps for prime-rl's ``[trainer.loss] type = "custom"`` (written for prime-rl 0.8).

    [trainer.loss]
    type = "custom"
    import_path = "stepagent.integrations.prime_rl.step_loss"
    kwargs = { clip = 0.2 }

prime-rl calls a loss for each sequence, adds the losses up and divides by the tokens of the batch.
Runs of ``loss_mask`` are steps; their advantages may come from
`stepagent.integrations.verifiers.assign_step_advantages`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .policy_losses import implicit_losses, step_losses


def step_loss(inputs: Any, *, clip: float = 0.2) -> Any:
    """PPO's clipped objective with an action as one decision, summed over tokens.

    Args:
        inputs: prime-rl's ``LossInputs`` of one sequence of T tokens.
        clip: ε > 0.

    Returns:
        prime-rl's ``LossOutputs``.
    """
    losses, clipped = step_losses(*_rows(inputs), clip_low=clip, clip_high=clip)
    return _outputs(losses, {"step_clipped": _mean(clipped, inputs)})


def implicit_loss(inputs: Any, *, beta: float) -> Any:
    """StepAgent's implicit reward of each action, told apart by the sign of its advantage.

    Args:
        inputs: as in `step_loss`; the reference is the policy that sampled.
        beta: β > 0.

    Returns:
        prime-rl's ``LossOutputs``.
    """
    losses, rewards = implicit_losses(*_rows(inputs), beta=beta)
    return _outputs(losses, {"implicit_reward": _mean(rewards, inputs)})


def _rows(inputs: Any) -> list[Tensor]:
    names = ("inference_logprobs", "trainer_logprobs", "advantages", "loss_mask")
    return [getattr(inputs, name)[None] for name in names]


def _mean(values: Tensor, inputs: Any) -> Tensor:
    count: Tensor = inputs.loss_mask.sum()
    return values.sum().detach() / count.clamp(min=1)


def _outputs(losses: Tensor, metrics: dict[str, Tensor]) -> Any:
    from prime_rl.trainer.rl.loss import LossOutputs

    return LossOutputs(loss=losses.sum(), metrics=metrics)
