"""`step_rewards`: implicit rewards of steps. Torch, or on CUDA Triton.

Sums and differences are float64 inside; results are float32, for float64 inputs float64, and a
gradient has the dtype of its input.

Dimensions: N tokens, S steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from stepagent.checks import (
    Index,
    as_offsets,
    check_floats,
    check_pair,
    check_positive,
    compute_dtype,
)
from stepagent.ops import paths
from stepagent.ops.operator import Operator, Saved
from stepagent.ops.sums import SpreadInputs, add_steps, step_rewards_backward_op


def step_rewards(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Index, *, beta: float
) -> Tensor:
    """Implicit reward of each step: r_s = β Σ_{n in s} (log π(y_n) − log π_ref(y_n)).

    DPO's reward (arXiv 2305.18290) of the step's action; subtracted and added in float64, in a
    fixed order.

    Args:
        logps_N, ref_logps_N: (N,) in nats, any float dtypes; the gradient goes to `logps_N` only.
        step_offsets: as `step_sums`.
        beta: β > 0, finite.

    Returns:
        rewards_S; float32, float64 where one of the log-probs is float64.

    Raises:
        TypeError, ValueError, NotImplementedError: as `step_sums`; ValueError for another beta or
            two different shapes.
    """
    return step_rewards_op(as_reward_inputs(logps_N, ref_logps_N, step_offsets, beta))


class RewardInputs(NamedTuple):
    logps_N: Tensor
    ref_logps_N: Tensor
    step_offsets: Tensor
    beta: float


def as_reward_inputs(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Index, beta: float
) -> RewardInputs:
    """Checked; the reference a constant."""
    check_floats(("logps_N", logps_N, 1))
    check_floats(("ref_logps_N", ref_logps_N, 1))
    check_pair("logps_N", logps_N, "ref_logps_N", ref_logps_N)
    check_positive("beta", beta)
    offsets = as_offsets("step_offsets", step_offsets, logps_N.device)
    return RewardInputs(logps_N, ref_logps_N.detach(), offsets, float(beta))


def _rewards(given: RewardInputs) -> Tensor:
    logps_N, ref_logps_N, step_offsets, beta = given
    if paths.runs_triton(logps_N, ref_logps_N):
        from stepagent.kernels.step_rewards import step_rewards  # loads triton: only here

        return step_rewards(logps_N, ref_logps_N, step_offsets, beta)
    return exact_rewards(given).to(compute_dtype(logps_N, ref_logps_N))


def exact_rewards(given: RewardInputs) -> Tensor:
    """In float64, in torch."""
    diff_N = given.logps_N.double() - given.ref_logps_N.double()
    return given.beta * add_steps(diff_N, given.step_offsets)


def _fake(given: RewardInputs) -> Tensor:
    dtype = compute_dtype(given.logps_N, given.ref_logps_N)
    return given.logps_N.new_empty(given.step_offsets.shape[0] - 1, dtype=dtype)


step_rewards_op = Operator("step_rewards", RewardInputs, _rewards, _fake)


def _save(ctx: Any, given: RewardInputs, rewards_S: Tensor) -> Mapping[str, Any]:
    N, dtype = given.logps_N.shape[0], given.logps_N.dtype
    return {"step_offsets": given.step_offsets, "beta": given.beta, "N": N, "dtype": dtype}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    (grad_S,) = saved.grads
    return {"logps_N": step_rewards_backward_op(SpreadInputs(grad_S, **saved.values))}


step_rewards_op.differentiate(_save, _backward)
