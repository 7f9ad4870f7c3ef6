"""`step_sums` as custom operators: sums over runs of tokens.

Dimensions: N values, S steps.
"""

from typing import Any

import torch
from torch import Tensor

from stepagent.checks import check_offsets


def _step_forward(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    check_offsets(step_offsets, len(values_N))
    # One worker adds a step from first to last; nothing leaks across steps, as differences of a
    # cumulative sum would let an inf do.
    sums_S = torch.segment_reduce(
        values_N.double(), "sum", offsets=step_offsets, initial=0.0, unsafe=True
    )
    return sums_S.to(values_N.dtype)


def _step_backward(grad_S: Tensor, step_offsets: Tensor, N: int) -> Tensor:
    return torch.repeat_interleave(grad_S, step_offsets.diff(), output_size=N)


step_sums_op = torch.library.custom_op("stepagent::step_sums", _step_forward, mutates_args=())
step_sums_backward_op = torch.library.custom_op(
    "stepagent::step_sums_backward", _step_backward, mutates_args=()
)


@step_sums_op.register_fake
def _(values_N: Tensor, step_offsets: Tensor) -> Tensor:
    return values_N.new_empty(step_offsets.shape[0] - 1)


@step_sums_backward_op.register_fake
def _(grad_S: Tensor, step_offsets: Tensor, N: int) -> Tensor:
    return grad_S.new_empty(N)


def _step_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    values_N, step_offsets = inputs
    ctx.N = values_N.shape[0]
    ctx.save_for_backward(step_offsets)


def _step_autograd(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None]:
    return step_sums_backward_op(grad_S, *ctx.saved_tensors, ctx.N), None


step_sums_op.register_autograd(_step_autograd, setup_context=_step_save)
