"""Sums and rewards of steps, the pairwise loss of the rewards, and their gradients to the tokens.

    r_s = β Σ_{n in s} (log π(y_n) − log π_ref(y_n)),    loss_p = −log σ(d_p),    d_p = r_E − r_A

One program a step, steps on grid axis 0 (the other axes end at 65,535). It adds its tokens in
float64, tile after tile in order, subtracting after the upcast; β and d_p are float64 too, as
rewards that are large and close leave a rounded difference no digits. For upstream gradients g:

    ∂r_s/∂log π(y_n) = β,    ∂loss_p/∂r_E = −σ(−d_p) = −∂loss_p/∂r_A

A step may be in many pairs. The backward sorts the pairs' ends by step, stably, so that the step's
own program finds them side by side, adds them in order and writes all its tokens: no atomics.

Dimensions: N tokens, S steps, P pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepagent.kernels.online_softmax import softplus
from stepagent.kernels.segments import segment

BLOCK = 256  # tokens in a tile, or pairs
WARPS = 1  # a step is tens of tokens: what more warps would read, other steps read meanwhile


@triton.jit(do_not_specialize=["N"])  # another N for every batch must compile nothing
def _step_rewards_kernel(
    # data
    logps_ptr,
    ref_logps_ptr,  # None without WITH_REF
    offsets_ptr,
    rewards_ptr,
    # shapes
    N: tl.int64,
    # strides
    logps_stride_n,
    ref_logps_stride_n,
    # constants
    beta: tl.float64,  # unannotated it would be rounded to float32
    WITH_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    start, stop, broken = segment(offsets_ptr, step, N)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < stop
        term = tl.load(logps_ptr + token * logps_stride_n, mask=inside, other=0.0).to(tl.float64)
        if WITH_REF:
            ref_logps = tl.load(ref_logps_ptr + token * ref_logps_stride_n, mask=inside, other=0.0)
            term -= ref_logps.to(tl.float64)
        sums += term
    reward = tl.sum(sums, 0) * beta
    tl.store(rewards_ptr + step, tl.where(broken, float("nan"), reward))


@triton.jit
def _write_tokens(grad, grad_logps_ptr, start, stop, BLOCK: tl.constexpr):
    """One gradient for all tokens of a step."""
    grad = grad.to(tl.float32)  # first: from float64 the interpreter cannot go to bfloat16
    for first in range(start, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(grad_logps_ptr + token, grad, mask=token < stop)


@triton.jit(do_not_specialize=["N"])
def _step_rewards_backward_kernel(
    # data
    grad_rewards_ptr,
    offsets_ptr,
    grad_logps_ptr,
    # shapes
    N: tl.int64,
    # constants
    beta: tl.float64,
    BLOCK: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    start, stop, _ = segment(offsets_ptr, step, N)
    grad = tl.load(grad_rewards_ptr + step).to(tl.float64) * beta
    _write_tokens(grad, grad_logps_ptr, start, stop, BLOCK)


@triton.jit(do_not_specialize=["S", "P"])
def _step_pair_loss_kernel(
    # data
    rewards_ptr,
    expert_steps_ptr,
    agent_steps_ptr,
    loss_ptr,
    pull_ptr,
    # shapes
    S: tl.int64,
    P: tl.int64,
    # constants
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < P
    expert = tl.load(expert_steps_ptr + pair, mask=inside, other=0)
    agent = tl.load(agent_steps_ptr + pair, mask=inside, other=0)
    expert_known = inside & (expert >= 0) & (expert < S)
    agent_known = inside & (agent >= 0) & (agent < S)
    expert_reward = tl.load(rewards_ptr + expert, mask=expert_known, other=float("nan"))
    agent_reward = tl.load(rewards_ptr + agent, mask=agent_known, other=float("nan"))
    d = (expert_reward - agent_reward).to(tl.float32)
    tl.store(loss_ptr + pair, softplus(-d), mask=inside)
    exp = tl.exp(-tl.abs(d))
    tl.store(pull_ptr + pair, tl.where(d > 0, exp, 1.0) / (1.0 + exp), mask=inside)


@triton.jit(do_not_specialize=["N", "P"])
def _step_pair_loss_backward_kernel(
    # data
    grad_loss_ptr,
    pull_ptr,
    order_ptr,
    end_offsets_ptr,
    offsets_ptr,
    grad_logps_ptr,
    # shapes
    N: tl.int64,
    P: tl.int64,
    # constants
    beta: tl.float64,
    BLOCK: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    first_end = tl.load(end_offsets_ptr + step)
    last_end = tl.load(end_offsets_ptr + step + 1)
    grads = tl.zeros([BLOCK], tl.float64)
    for first in range(first_end, last_end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < last_end
        end = tl.load(order_ptr + place, mask=inside, other=0)
        is_expert = end < P
        pair = tl.where(is_expert, end, end - P)
        pull = tl.load(pull_ptr + pair, mask=inside, other=0.0).to(tl.float64)
        grad = tl.load(grad_loss_ptr + pair, mask=inside, other=0.0).to(tl.float64)
        grads += tl.where(is_expert, -pull, pull) * grad
    start, stop, _ = segment(offsets_ptr, step, N)
    _write_tokens(tl.sum(grads, 0) * beta, grad_logps_ptr, start, stop, BLOCK)


def step_rewards(
    logps_N: Tensor,
    ref_logps_N: Tensor | None,
    step_offsets: Tensor,
    beta: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """rewards_S in `dtype`; without `ref_logps_N` the sums of `logps_N`, times β.

    Args:
        logps_N, ref_logps_N: (N,) any float dtypes and strides.
        step_offsets: (S + 1,) int64; a step whose offsets break the rule gets NaN.
    """
    rewards_S = torch.empty(step_offsets.shape[0] - 1, dtype=dtype, device=logps_N.device)
    if len(rewards_S):
        with torch.cuda.device_of(logps_N):  # Triton launches on the current device
            _step_rewards_kernel[(len(rewards_S),)](
                logps_N,
                ref_logps_N,
                step_offsets.contiguous(),
                rewards_S,
                logps_N.shape[0],
                logps_N.stride(0),
                0 if ref_logps_N is None else ref_logps_N.stride(0),
                beta,
                WITH_REF=ref_logps_N is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return rewards_S


def step_rewards_backward(
    grad_S: Tensor, step_offsets: Tensor, beta: float, N: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of logps_N, in `dtype`; NaN for a token that no step with good offsets holds.

    Args:
        grad_S: (S,) float32, any stride.
        step_offsets: as `step_rewards`.
    """
    grad_logps_N = torch.full((N,), torch.nan, dtype=dtype, device=grad_S.device)
    if len(grad_S):
        with torch.cuda.device_of(grad_S):  # Triton launches on the current device
            _step_rewards_backward_kernel[(len(grad_S),)](
                grad_S.contiguous(),
                step_offsets.contiguous(),
                grad_logps_N,
                N,
                beta,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return grad_logps_N


def step_pair_loss(
    rewards_S: Tensor, expert_steps_P: Tensor, agent_steps_P: Tensor
) -> tuple[Tensor, Tensor]:
    """loss_P, and pull_P = σ(−d_p) for the backward; both float32.

    Args:
        rewards_S: (S,) float64, as `step_rewards` returns them.
        expert_steps_P, agent_steps_P: (P,) int64; the loss of a step outside [0, S) is NaN.
    """
    P = len(expert_steps_P)
    loss_P = torch.empty(P, dtype=torch.float32, device=rewards_S.device)
    pull_P = torch.empty_like(loss_P)
    if P:
        with torch.cuda.device_of(rewards_S):  # Triton launches on the current device
            _step_pair_loss_kernel[(triton.cdiv(P, BLOCK),)](
                rewards_S,
                expert_steps_P.contiguous(),
                agent_steps_P.contiguous(),
                loss_P,
                pull_P,
                len(rewards_S),
                P,
                BLOCK=BLOCK,
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return loss_P, pull_P


def step_pair_loss_backward(
    grad_P: Tensor,
    pull_P: Tensor,
    step_offsets: Tensor,
    expert_steps_P: Tensor,
    agent_steps_P: Tensor,
    beta: float,
    N: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of logps_N, in `dtype`; 0 for a step that is in no pair, NaN as above.

    Args:
        grad_P: (P,) float32, any stride.
        pull_P: what `step_pair_loss` returned.
        step_offsets: as `step_rewards`.
        expert_steps_P, agent_steps_P: as `step_pair_loss`.
    """
    S, P = step_offsets.shape[0] - 1, len(grad_P)
    grad_logps_N = torch.full((N,), torch.nan, dtype=dtype, device=grad_P.device)
    # Pair p has two ends, p at the expert's step and P + p at the agent's.
    steps_2P, order_2P = torch.cat([expert_steps_P, agent_steps_P]).sort(stable=True)
    end_offsets = torch.searchsorted(steps_2P, torch.arange(S + 1, device=grad_P.device))
    if S:
        with torch.cuda.device_of(grad_P):  # Triton launches on the current device
            _step_pair_loss_backward_kernel[(S,)](
                grad_P.contiguous(),
                pull_P,
                order_2P,
                end_offsets,
                step_offsets.contiguous(),
                grad_logps_N,
                N,
                P,
                beta,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return grad_logps_N
