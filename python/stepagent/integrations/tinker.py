"""StepAgent's losses for tinker's ``forward_backward_custom`` (written for tinker 0.38).

A datum is one state and what the policy wrote after it, or one whole conversation; its
``loss_fn_inputs`` hold, as those of tinker do, one number a token of ``target_tokens``:

    mask            1 where the policy wrote the token; a run of them is a step
    ref_logprobs    log-probs under the reference            (implicit_pairs)
    logprobs        log-probs under the policy that sampled  (step_ppo)
    advantages      each step's, as `step_advantages` makes  (step_ppo)

A loss is a function ``(data, logprobs_list) -> (loss, metrics)``; nothing here imports tinker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..learning.losses import implicit_step_loss, ppo_loss
from ..ops import step_rewards, step_sums
from .masked_steps import MaskedSteps

Loss = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]


def implicit_pairs(*, beta: float) -> Loss:
    """The loss −log σ(r_E − r_A) of pairs: data are the expert's, the agent's, the expert's, …

        r = β Σ (log π − log π_ref) over the tokens that the policy wrote

    Args:
        beta: β > 0.

    Returns:
        A loss, the mean over pairs, whose data have ``mask`` and ``ref_logprobs``.
    """

    def loss_fn(
        data: Sequence[Any], logprobs_list: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        if not len(data) or len(data) % 2:
            raise ValueError(f"data must be pairs of expert and agent, got {len(data)}")
        logps_N, offsets, rows = _steps(data, logprobs_list)
        ref_logps_N = _column("ref_logprobs", data, logprobs_list)
        rewards_B = step_sums(step_rewards(logps_N, ref_logps_N, offsets, beta=beta), rows)
        expert_P, agent_P = rewards_B[0::2], rewards_B[1::2]
        loss = implicit_step_loss(expert_P, agent_P).mean()
        margins_P = (expert_P - agent_P).detach()
        return loss, {
            "rewards/margins": margins_P.mean().item(),
            "rewards/accuracies": (margins_P > 0).float().mean().item(),
        }

    return loss_fn


def step_ppo(*, clip: float = 0.2) -> Loss:
    """`stepagent.ppo_loss`, an action of the policy as one decision; the mean over steps.

    Args:
        clip: ε > 0.

    Returns:
        A loss, whose data have ``mask``, ``logprobs`` and ``advantages``.
    """

    def loss_fn(
        data: Sequence[Any], logprobs_list: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        logps_N, offsets, _ = _steps(data, logprobs_list)
        old_N = _column("logprobs", data, logprobs_list)
        advantages_N = _column("advantages", data, logprobs_list)
        advantages_S = step_sums(advantages_N, offsets) / offsets.diff()
        loss = ppo_loss(logps_N, old_N, advantages_S, offsets, clip=clip)
        moved_S = step_sums((logps_N - old_N).detach(), offsets)
        return loss, {"step_log_ratio": moved_S.mean().item()}

    return loss_fn


def step_advantages(values: Sequence[float], mask: Any) -> list[float]:
    """A datum's ``loss_fn_inputs["advantages"]``: each step's value at its tokens, 0 elsewhere.

    Args:
        values: one advantage a step, such as `stepagent.step_gae` or `stepagent.gigpo` gives.
        mask: one number a target token, 1 where the policy wrote it.

    Raises:
        ValueError: for another number of values than the mask has runs of ones.
    """
    steps = MaskedSteps.of(torch.as_tensor(mask)[None])
    advantages: list[float] = steps.spread(steps.join([values], "values"))[0].tolist()
    return advantages


def _steps(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probs (N,) of what the policy wrote, its steps, and the steps of each datum."""
    if len(data) != len(logprobs_list):
        raise ValueError(f"logprobs_list must have {len(data)} entries, got {len(logprobs_list)}")
    logps, starts, rows, before = [], [torch.zeros(1, dtype=torch.long)], [0], 0
    for i, logprobs in enumerate(logprobs_list):
        steps = MaskedSteps.of(_mask(data, i, logprobs)[None])
        if steps.counts_B == [0]:
            raise ValueError(f"data[{i}] mask must mark what the policy wrote, got no 1 in it")
        logps.append(steps.tokens(logprobs[None]))
        starts.append(steps.step_offsets[1:] + before)
        before += int(steps.step_offsets[-1])
        rows.append(rows[-1] + steps.counts_B[0])
    return torch.cat(logps), torch.cat(starts), torch.tensor(rows)


def _column(name: str, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Tensor:
    """(N,) of the tokens that the policy wrote."""
    values = [
        _input(name, data, i, logprobs)[_mask(data, i, logprobs)]
        for i, logprobs in enumerate(logprobs_list)
    ]
    return torch.cat(values)


def _mask(data: Sequence[Any], i: int, logprobs: Tensor) -> Tensor:
    return _input("mask", data, i, logprobs) != 0


def _input(name: str, data: Sequence[Any], i: int, logprobs: Tensor) -> Tensor:
    inputs = data[i].loss_fn_inputs
    if name not in inputs:
        raise ValueError(f"data[{i}] must have loss_fn_inputs[{name!r}], got {sorted(inputs)}")
    values = torch.as_tensor(inputs[name].to_torch())
    if values.shape != logprobs.shape:
        raise ValueError(
            f"data[{i}] {name} must have the shape of its log-probs, {tuple(logprobs.shape)}, got "
            f"{tuple(values.shape)}"
        )
    return values
