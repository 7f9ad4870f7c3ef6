"""`step_pair_loss`: the loss of pairs of steps, from the log-probs. Torch, or on CUDA Triton.

Sums, rewards and differences are float64 inside; results are float32, for float64 inputs float64,
and a gradient has the dtype of its input.

Dimensions: N tokens, S steps, P pairs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stepagent.checks import Index, as_index, check_length, check_steps, compute_dtype
from stepagent.ops import paths
from stepagent.ops.blocks import sum_rows
from stepagent.ops.operator import Operator, Saved
from stepagent.ops.rewards import RewardInputs, as_reward_inputs, exact_rewards
from stepagent.ops.sums import SpreadInputs, spread_steps


def step_pair_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Index,
    expert_steps_P: Index,
    agent_steps_P: Index,
    *,
    beta: float,
) -> Tensor:
    """Prefer the expert's action at each step, from the log-probs: loss_p = −log σ(r_E − r_A).

    `implicit_step_loss` of the two steps' `step_rewards` (arXiv 2411.03817) as one operator. The
    difference is taken in float64, so rewards that are large and close keep its digits.

    Args:
        logps_N, ref_logps_N, step_offsets, beta: as `step_rewards`.
        expert_steps_P, agent_steps_P: (P,) int32 or int64 in [0, S): the two steps of each pair. A
            step may be in many pairs, or in none.

    Returns:
        loss_P in nats; float32, float64 where one of the log-probs is float64. The gradient is
        added in float64 and a fixed order: the same inputs give the same bits.

    Raises:
        TypeError, ValueError, NotImplementedError: as `step_rewards`; ValueError for two numbers of
            steps, or a step outside [0, S) (unchecked on CUDA, as the offsets).
    """
    rewards = as_reward_inputs(logps_N, ref_logps_N, step_offsets, beta)
    expert_steps_P = as_index("expert_steps_P", expert_steps_P, logps_N.device)
    agent_steps_P = as_index("agent_steps_P", agent_steps_P, logps_N.device)
    check_length("agent_steps_P", agent_steps_P, expert_steps_P.shape[0], "expert_steps_P")
    loss_P, _ = step_pair_loss_op(
        PairInputs(
            rewards.logps_N,
            rewards.ref_logps_N,
            rewards.step_offsets,
            expert_steps_P,
            agent_steps_P,
            rewards.beta,
        )
    )
    return loss_P


class PairInputs(NamedTuple):
    logps_N: Tensor
    ref_logps_N: Tensor
    step_offsets: Tensor
    expert_steps_P: Tensor
    agent_steps_P: Tensor
    beta: float


def pair_losses(given: PairInputs) -> tuple[Tensor, Tensor]:
    """loss_p = −log σ(d_p) with d_p = r_E − r_A, and for the backward pull_p = σ(−d_p)."""
    logps_N, ref_logps_N, step_offsets, expert_steps_P, agent_steps_P, beta = given
    if paths.runs_triton(logps_N, ref_logps_N):
        from stepagent.kernels.step_rewards import step_pair_loss, step_rewards  # loads triton

        rewards_S = step_rewards(logps_N, ref_logps_N, step_offsets, beta, torch.float64)
        return step_pair_loss(rewards_S, expert_steps_P, agent_steps_P)
    S = step_offsets.shape[0] - 1
    check_steps("expert_steps_P", expert_steps_P, S)
    check_steps("agent_steps_P", agent_steps_P, S)
    rewards_S = exact_rewards(RewardInputs(logps_N, ref_logps_N, step_offsets, beta))
    d_P = rewards_S[expert_steps_P] - rewards_S[agent_steps_P]
    dtype = compute_dtype(logps_N, ref_logps_N)
    return -F.logsigmoid(d_P).to(dtype), torch.sigmoid(-d_P).to(dtype)


def _fake(given: PairInputs) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(given.logps_N, given.ref_logps_N)
    loss_P = torch.empty_like(given.expert_steps_P, dtype=dtype)
    return loss_P, torch.empty_like(loss_P)


step_pair_loss_op = Operator("step_pair_loss", PairInputs, pair_losses, _fake)


# ------------------------------------------------------------------ the backward


class PairGradInputs(NamedTuple):
    grad_P: Tensor
    pull_P: Tensor
    step_offsets: Tensor
    expert_steps_P: Tensor
    agent_steps_P: Tensor
    beta: float
    N: int
    dtype: torch.dtype


def pair_gradients(given: PairGradInputs) -> Tensor:
    """Gradient of logps_N: ∂loss_p/∂r_E = −σ(−d_p) = −∂loss_p/∂r_A, and ∂r/∂logp = β."""
    if paths.runs_triton(given.grad_P):
        from stepagent.kernels.step_rewards import step_pair_loss_backward

        return step_pair_loss_backward(*given)
    grad_d_P = -given.pull_P.double() * given.grad_P.double()
    ends = torch.cat([given.expert_steps_P, given.agent_steps_P])
    pulls = torch.cat([grad_d_P, -grad_d_P])
    grad_S = sum_rows(pulls[:, None], ends, given.step_offsets.shape[0] - 1).squeeze(1)
    return spread_steps(SpreadInputs(grad_S, given.step_offsets, given.beta, given.N, given.dtype))


def _fake_gradients(given: PairGradInputs) -> Tensor:
    return given.grad_P.new_empty(given.N, dtype=given.dtype)


step_pair_loss_backward_op = Operator(
    "step_pair_loss_backward", PairGradInputs, pair_gradients, _fake_gradients
)


def _save(ctx: Any, given: PairInputs, results: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
    ctx.set_materialize_grads(False)  # the loss alone is asked for, unless the operator is called
    logps_N, _, *rest = given
    named = dict(zip(PairInputs._fields[2:], rest, strict=True))
    return {**named, "pull_P": results[1], "N": logps_N.shape[0], "dtype": logps_N.dtype}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    # The pull is a function of the log-probs too. Were it marked as a constant, a second derivative
    # would lose its term in silence; so it reaches the backward's operator, which has none, and
    # torch says so.
    grad_P, grad_pull_P = saved.grads
    if grad_pull_P is not None:  # ∂pull/∂d = −pull (1 − pull), where ∂loss/∂d = −pull
        through_pull_P = (1 - saved.values["pull_P"]) * grad_pull_P
        grad_P = through_pull_P if grad_P is None else grad_P + through_pull_P
    if grad_P is None:
        return {}
    return {"logps_N": step_pair_loss_backward_op(PairGradInputs(grad_P, **saved.values))}


step_pair_loss_op.differentiate(_save, _backward)
