"""`step_sums`: sums of values over steps. Torch, or on CUDA Triton.

Float64 inside; results are float32, for float64 inputs float64, and a gradient has the dtype of
its input.

Dimensions: N tokens, S steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepagent.checks import Index, as_offsets, check_floats, check_offsets, compute_dtype
from stepagent.ops import paths
from stepagent.ops.operator import Operator, Saved


def step_sums(values_N: Tensor, step_offsets: Index) -> Tensor:
    """sums[s] = Σ values[step_offsets[s] : step_offsets[s + 1]], in float64 and a fixed order.

    Args:
        values_N: (N,), any float dtype.
        step_offsets: (S + 1,) int32 or int64, ascending from 0 to N; an empty step sums to 0.

    Returns:
        sums_S; float32, float64 for float64 values.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: another shape or device, or offsets that do not ascend from 0 to N (unchecked on
            CUDA, where looking at them would stall the stream).
        NotImplementedError: values with a forward-mode tangent.
    """
    check_floats(("values_N", values_N, 1))
    offsets = as_offsets("step_offsets", step_offsets, values_N.device)
    return step_sums_op(SumInputs(values_N, offsets))


class SumInputs(NamedTuple):
    values_N: Tensor
    step_offsets: Tensor


def _sums(given: SumInputs) -> Tensor:
    values_N, step_offsets = given
    if paths.runs_triton(values_N):
        from stepagent.kernels.step_rewards import step_rewards  # loads triton: only here

        return step_rewards(values_N, None, step_offsets, 1.0)
    return add_steps(values_N.double(), step_offsets).to(compute_dtype(values_N))


def add_steps(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    """Of float64 values, in torch."""
    check_offsets("step_offsets", step_offsets, len(values_N))
    # One worker adds a step from first to last; nothing leaks across steps, as differences of a
    # cumulative sum would let an inf do.
    return torch.segment_reduce(values_N, "sum", offsets=step_offsets, initial=0.0, unsafe=True)


def _fake(given: SumInputs) -> Tensor:
    return given.values_N.new_empty(
        given.step_offsets.shape[0] - 1, dtype=compute_dtype(given.values_N)
    )


step_sums_op = Operator("step_sums", SumInputs, _sums, _fake)


# ------------------------------------------------- the backward, also that of the rewards


class SpreadInputs(NamedTuple):
    grad_S: Tensor
    step_offsets: Tensor
    beta: float
    N: int
    dtype: torch.dtype


def spread_steps(given: SpreadInputs) -> Tensor:
    """β times each step's gradient, for each of its tokens."""
    grad_S, step_offsets, beta, N, dtype = given
    if paths.runs_triton(grad_S):
        from stepagent.kernels.step_rewards import step_rewards_backward

        return step_rewards_backward(grad_S, step_offsets, beta, N, dtype)
    grad_S = (beta * grad_S.double()).to(dtype)
    return torch.repeat_interleave(grad_S, step_offsets.diff(), output_size=N)


def _fake_spread(given: SpreadInputs) -> Tensor:
    return given.grad_S.new_empty(given.N, dtype=given.dtype)


step_rewards_backward_op = Operator(
    "step_rewards_backward", SpreadInputs, spread_steps, _fake_spread
)


def _save(ctx: Any, given: SumInputs, sums_S: Tensor) -> Mapping[str, Any]:
    values_N, step_offsets = given
    N, dtype = values_N.shape[0], values_N.dtype
    return {"step_offsets": step_offsets, "beta": 1.0, "N": N, "dtype": dtype}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    (grad_S,) = saved.grads
    return {"values_N": step_rewards_backward_op(SpreadInputs(grad_S, **saved.values))}


step_sums_op.differentiate(_save, _backward)
