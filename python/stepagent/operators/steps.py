"""`step_sums`, `step_rewards` and `step_pair_loss` as custom operators, torch and Triton on CUDA.

Sums, rewards and differences are float64 inside; results are float32, for float64 inputs float64,
and a gradient has the dtype of its input.

Dimensions: N tokens, S steps, P pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepagent.checks import check_offsets, check_steps, compute_dtype
from stepagent.operators import paths
from stepagent.operators.blocks import sum_rows


def _sums(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    """Of float64 values."""
    check_offsets("step_offsets", step_offsets, len(values_N))
    # One worker adds a step from first to last; nothing leaks across steps, as differences of a
    # cumulative sum would let an inf do.
    return torch.segment_reduce(values_N, "sum", offsets=step_offsets, initial=0.0, unsafe=True)


# -------------------------------------------------------- step_sums and step_rewards


def sums_forward(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    if paths.runs_triton(values_N):
        from stepagent.kernels.step_rewards import step_rewards  # loads triton: only here

        return step_rewards(values_N, None, step_offsets, 1.0)
    return _sums(values_N.double(), step_offsets).to(compute_dtype(values_N))


def rewards_forward(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Tensor, beta: float
) -> Tensor:
    if paths.runs_triton(logps_N, ref_logps_N):
        from stepagent.kernels.step_rewards import step_rewards

        return step_rewards(logps_N, ref_logps_N, step_offsets, beta)
    sums_S = _sums(logps_N.double() - ref_logps_N.double(), step_offsets)
    return (beta * sums_S).to(compute_dtype(logps_N, ref_logps_N))


def rewards_backward(
    grad_S: Tensor, step_offsets: Tensor, beta: float, N: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of logps_N; with β = 1 that of the values of `step_sums`."""
    if paths.runs_triton(grad_S):
        from stepagent.kernels.step_rewards import step_rewards_backward

        return step_rewards_backward(grad_S, step_offsets, beta, N, dtype)
    grad_S = (beta * grad_S.double()).to(dtype)
    return torch.repeat_interleave(grad_S, step_offsets.diff(), output_size=N)


step_sums_op = torch.library.custom_op("stepagent::step_sums", sums_forward, mutates_args=())
step_rewards_op = torch.library.custom_op(
    "stepagent::step_rewards", rewards_forward, mutates_args=()
)
step_rewards_backward_op = torch.library.custom_op(
    "stepagent::step_rewards_backward", rewards_backward, mutates_args=()
)


@step_sums_op.register_fake
def _(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    return values_N.new_empty(step_offsets.shape[0] - 1, dtype=compute_dtype(values_N))


@step_rewards_op.register_fake
def _(logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Tensor, beta: float) -> Tensor:
    dtype = compute_dtype(logps_N, ref_logps_N)
    return logps_N.new_empty(step_offsets.shape[0] - 1, dtype=dtype)


@step_rewards_backward_op.register_fake
def _(grad_S: Tensor, step_offsets: Tensor, beta: float, N: int, dtype: torch.dtype) -> Tensor:
    return grad_S.new_empty(N, dtype=dtype)


def _sums_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values_N, step_offsets = inputs
    ctx.N, ctx.dtype = values_N.shape[0], values_N.dtype
    ctx.save_for_backward(step_offsets)


def _sums_autograd(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None]:
    return step_rewards_backward_op(grad_S, *ctx.saved_tensors, 1.0, ctx.N, ctx.dtype), None


def _rewards_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logps_N, _, step_offsets, ctx.beta = inputs
    ctx.N, ctx.dtype = logps_N.shape[0], logps_N.dtype
    ctx.save_for_backward(step_offsets)


def _rewards_autograd(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
    grad_logps_N = step_rewards_backward_op(grad_S, *ctx.saved_tensors, ctx.beta, ctx.N, ctx.dtype)
    return grad_logps_N, None, None, None


step_sums_op.register_autograd(_sums_autograd, setup_context=_sums_save)
step_rewards_op.register_autograd(_rewards_autograd, setup_context=_rewards_save)


# ------------------------------------------------------------------ step_pair_loss


def pair_forward(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """loss_p = −log σ(d_p) with d_p = r_E − r_A, and for the backward pull_p = σ(−d_p)."""
    if paths.runs_triton(logps_N, ref_logps_N):
        from stepagent.kernels.step_rewards import step_pair_loss, step_rewards

        rewards_S = step_rewards(logps_N, ref_logps_N, step_offsets, beta, torch.float64)
        return step_pair_loss(rewards_S, expert_steps_P, agent_steps_P)
    S = step_offsets.shape[0] - 1
    check_steps("expert_steps_P", expert_steps_P, S)
    check_steps("agent_steps_P", agent_steps_P, S)
    rewards_S = beta * _sums(logps_N.double() - ref_logps_N.double(), step_offsets)
    d_P = rewards_S[expert_steps_P] - rewards_S[agent_steps_P]
    dtype = compute_dtype(logps_N, ref_logps_N)
    return -F.logsigmoid(d_P).to(dtype), torch.sigmoid(-d_P).to(dtype)


def pair_backward(
    grad_P: Tensor,
    pull_P: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
    N: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of logps_N: ∂loss_p/∂r_E = −σ(−d_p) = −∂loss_p/∂r_A, and ∂r/∂logp = β."""
    if paths.runs_triton(grad_P):
        from stepagent.kernels.step_rewards import step_pair_loss_backward

        steps_P = (expert_steps_P, agent_steps_P)
        return step_pair_loss_backward(grad_P, pull_P, step_offsets, *steps_P, beta, N, dtype)
    grad_d_P = -pull_P.double() * grad_P.double()
    ends = torch.cat([expert_steps_P, agent_steps_P])
    pulls = torch.cat([grad_d_P, -grad_d_P])
    grad_S1 = sum_rows(pulls[:, None], ends, step_offsets.shape[0] - 1)
    return rewards_backward(grad_S1.squeeze(1), step_offsets, beta, N, dtype)


step_pair_loss_op = torch.library.custom_op(
    "stepagent::step_pair_loss", pair_forward, mutates_args=()
)
step_pair_loss_backward_op = torch.library.custom_op(
    "stepagent::step_pair_loss_backward", pair_backward, mutates_args=()
)


@step_pair_loss_op.register_fake
def _(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    loss_P = torch.empty_like(expert_steps_P, dtype=compute_dtype(logps_N, ref_logps_N))
    return loss_P, torch.empty_like(loss_P)


@step_pair_loss_backward_op.register_fake
def _(
    grad_P: Tensor,
    pull_P: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
    N: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad_P.new_empty(N, dtype=dtype)


def _pair_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logps_N, _, *index, ctx.beta = inputs
    _, pull_P = output
    ctx.N, ctx.dtype = logps_N.shape[0], logps_N.dtype
    ctx.mark_non_differentiable(pull_P)
    ctx.save_for_backward(pull_P, *index)


def _pair_autograd(ctx: Any, grad_P: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_logps_N = step_pair_loss_backward_op(
        grad_P, *ctx.saved_tensors, ctx.beta, ctx.N, ctx.dtype
    )
    return grad_logps_N, None, None, None, None, None


step_pair_loss_op.register_autograd(_pair_autograd, setup_context=_pair_save)
