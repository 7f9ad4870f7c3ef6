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
from stepagent.operators.paths import suits_triton


def _sums(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    """Of float64 values."""
    check_offsets("step_offsets", step_offsets, len(values_N))
    # One worker adds a step from first to last; nothing leaks across steps, as differences of a
    # cumulative sum would let an inf do.
    return torch.segment_reduce(values_N, "sum", offsets=step_offsets, initial=0.0, unsafe=True)


# -------------------------------------------------------- step_sums and step_rewards


def sums_forward(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    return _sums(values_N.double(), step_offsets).to(compute_dtype(values_N))


def rewards_forward(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Tensor, beta: float
) -> Tensor:
    sums_S = _sums(logps_N.double() - ref_logps_N.double(), step_offsets)
    return (beta * sums_S).to(compute_dtype(logps_N, ref_logps_N))


def rewards_backward(
    grad_S: Tensor, step_offsets: Tensor, beta: float, N: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of logps_N; with β = 1 that of the values of `step_sums`."""
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


@step_sums_op.register_kernel("cuda")
def sums_forward_cuda(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    if not suits_triton(values_N):
        return sums_forward(values_N, step_offsets)
    from stepagent.kernels.step_rewards import step_rewards as kernel  # loads triton: only here

    return kernel(values_N, None, step_offsets, 1.0)


@step_rewards_op.register_kernel("cuda")
def rewards_forward_cuda(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Tensor, beta: float
) -> Tensor:
    if not suits_triton(logps_N, ref_logps_N):
        return rewards_forward(logps_N, ref_logps_N, step_offsets, beta)
    from stepagent.kernels.step_rewards import step_rewards as kernel

    return kernel(logps_N, ref_logps_N, step_offsets, beta)


@step_rewards_backward_op.register_kernel("cuda")
def rewards_backward_cuda(
    grad_S: Tensor, step_offsets: Tensor, beta: float, N: int, dtype: torch.dtype
) -> Tensor:
    inputs = (grad_S, step_offsets, beta, N, dtype)
    if not suits_triton(grad_S):
        return rewards_backward(*inputs)
    from stepagent.kernels.step_rewards import step_rewards_backward as kernel

    return kernel(*inputs)


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
    grad_d_P = -pull_P.double() * grad_P.double()
    grad_S = grad_d_P.new_zeros(step_offsets.shape[0] - 1)
    # index_put_ adds float64 in a fixed order; index_add_ on CUDA does not.
    grad_S.index_put_((expert_steps_P,), grad_d_P, accumulate=True)
    grad_S.index_put_((agent_steps_P,), -grad_d_P, accumulate=True)
    return rewards_backward(grad_S, step_offsets, beta, N, dtype)


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


@step_pair_loss_op.register_kernel("cuda")
def pair_forward_cuda(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    inputs = (logps_N, ref_logps_N, step_offsets)
    if not suits_triton(logps_N, ref_logps_N):
        return pair_forward(*inputs, expert_steps_P, agent_steps_P, beta)
    from stepagent.kernels.step_rewards import step_pair_loss as kernel
    from stepagent.kernels.step_rewards import step_rewards as rewards_kernel

    rewards_S = rewards_kernel(*inputs, beta, torch.float64)
    return kernel(rewards_S, expert_steps_P, agent_steps_P)


@step_pair_loss_backward_op.register_kernel("cuda")
def pair_backward_cuda(
    grad_P: Tensor,
    pull_P: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
    N: int,
    dtype: torch.dtype,
) -> Tensor:
    inputs = (grad_P, pull_P, step_offsets, expert_steps_P, agent_steps_P, beta, N, dtype)
    if not suits_triton(grad_P):
        return pair_backward(*inputs)
    from stepagent.kernels.step_rewards import step_pair_loss_backward as kernel

    return kernel(*inputs)


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
