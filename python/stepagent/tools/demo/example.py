"""One trajectory to look at: what each of its steps is worth, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...acting.inspection import inspect
from ...data.encoding import encode
from ...data.trajectory import Trajectory
from ...models import score_trees
from ...ops import step_sums
from ...report.demo import ExampleStep, ExampleTrajectory
from ...trees.tree import pack_step_pairs
from .agents import MAX_NEW_TOKENS, Demo
from .measuring import held_out, successes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def example(demo: Demo) -> ExampleTrajectory:
    """A held-out episode that StepAgent solved and SFT did not, at the expert's states."""
    trajectory = most_to_show(held_out(demo), successes(demo, "sft"), successes(demo, demo.main))
    return with_step_rewards(
        trajectory,
        demo.model("sft"),
        demo.model(demo.main),
        demo.tokenizer,
        beta=demo.settings.beta,
        max_new_tokens=MAX_NEW_TOKENS,
        ends=[demo.tokenizer.eos_token_id],
    )


def most_to_show(trajectories: list[Trajectory], before: list[int], after: list[int]) -> Trajectory:
    """The longest of those that were solved after training and not before, or else of all."""
    gained = [i for i, (b, a) in enumerate(zip(before, after, strict=True)) if a > b]
    index = max(gained or range(len(trajectories)), key=lambda i: trajectories[i].num_steps)
    return trajectories[index]


@torch.no_grad()
def with_step_rewards(
    trajectory: Trajectory,
    sft: PreTrainedModel,
    agent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beta: float,
    max_new_tokens: int,
    ends: Sequence[int],
) -> ExampleTrajectory:
    """What both models do at the expert's states, and β (log π − log π_sft) of the actions.

    Args:
        ends: ids of the tokens that end an action.
    """
    trunk = encode(trajectory, tokenizer)
    (before,), (after,) = (
        inspect(
            model,
            [trunk],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            eos_token_id=ends,
        )
        for model in (sft, agent)
    )
    (tree,) = pack_step_pairs([trunk], [before])
    difference_N = score_trees(agent, [tree]) - score_trees(sft, [tree])
    rewards = beta * step_sums(difference_N, tree.step_offsets)
    contents = [message["content"] for message in trajectory.messages]

    def text(token_ids: Any) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    steps = tuple(
        ExampleStep(
            observation=contents[2 * t],
            expert_action=contents[2 * t + 1],
            before=text(before[t][0].token_ids),
            after=text(after[t][0].token_ids),
            reward=float(rewards[2 * t]),
            reward_before=float(rewards[2 * t + 1]),
        )
        for t in range(trajectory.num_steps)
    )
    return ExampleTrajectory(title=str(trajectory.id), steps=steps)
