"""`token_logprobs` and `logprob_diff` as custom operators: torch, or on CUDA Triton.

The torch path upcasts a few rows of logits at a time. Results are computed and returned in float32,
for float64 inputs in float64; a gradient has the dtype of its input.

Dimensions: N tokens, V vocabulary; n tokens with a valid label.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stepagent.checks import check_labels, check_temperature
from stepagent.operators import blocks, paths
from stepagent.operators.blocks import (
    Fold,
    Results,
    divide,
    like_results,
    per_token,
    scored,
    upstream_of,
)


def _row_chunks(tokens_n: Tensor, V: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The scored rows, as many at a time as the workspace holds; at least one."""
    rows = max(blocks.workspace_bytes(tokens_n.device) // (dtype.itemsize * V), 1)
    return iter(torch.split(tokens_n, rows))


def _chunk_logits(logits_NV: Tensor, temperature: Tensor, chunk_n: Tensor) -> Tensor:
    """A copy of these rows, upcast before the temperature divides them."""
    rows_nV = logits_NV[chunk_n].to(temperature.dtype)
    return divide(rows_nV, per_token(temperature, chunk_n), rows_nV)


def _fold_rows(
    logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, with_entropy: bool
) -> Results:
    N, V = logits_NV.shape
    zeros_N = temperature.new_zeros(N)
    results = (zeros_N, zeros_N.clone(), zeros_N.clone(), zeros_N.clone())
    for chunk_n in _row_chunks(scored(labels_N), V, temperature.dtype):
        fold = Fold(labels_N[chunk_n], temperature.dtype, with_entropy)
        z_nV = _chunk_logits(logits_NV, temperature, chunk_n)
        fold.update(z_nV, 0, z_nV)
        for result_N, result_n in zip(results, fold.finish(), strict=True):
            result_N[chunk_n] = result_n
    return results


# ------------------------------------------------------------- token_logprobs


def token_forward(
    logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, with_entropy: bool, check: str
) -> Results:
    check_labels(labels_N, logits_NV.shape[1], check, "token_logprobs")
    check_temperature(temperature)
    if paths.runs_triton(logits_NV, temperature):
        from stepagent.kernels.token_logprobs import token_logprobs  # loads triton: only here

        return token_logprobs(logits_NV, labels_N, temperature, with_entropy=with_entropy)
    return _fold_rows(logits_NV, labels_N, temperature, with_entropy)


def token_backward(
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: list[Tensor],
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Gradient of logits_NV."""
    grads = (grad_logps_N, grad_entropy_N)
    if paths.runs_triton(logits_NV, temperature):
        from stepagent.kernels.token_logprobs import token_logprobs_backward

        return token_logprobs_backward(*grads, results, logits_NV, labels_N, temperature)
    grad_logits_NV = torch.zeros_like(logits_NV)
    for chunk_n in _row_chunks(scored(labels_N), logits_NV.shape[1], temperature.dtype):
        chunk_temperature = per_token(temperature, chunk_n)
        upstream = upstream_of(chunk_n, labels_N[chunk_n], chunk_temperature, results, *grads)
        z_nV = _chunk_logits(logits_NV, temperature, chunk_n)
        grad_logits_NV[chunk_n] = upstream.grad_logits(z_nV, 0, z_nV).to(logits_NV.dtype)
    return grad_logits_NV


token_logprobs_op = torch.library.custom_op(
    "stepagent::token_logprobs", token_forward, mutates_args=()
)
token_logprobs_backward_op = torch.library.custom_op(
    "stepagent::token_logprobs_backward", token_backward, mutates_args=()
)


@token_logprobs_op.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, *_: Any) -> Results:
    return like_results(labels_N, temperature.dtype)


@token_logprobs_backward_op.register_fake
def _(_: Tensor, __: Tensor | None, ___: list[Tensor], logits_NV: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(logits_NV)


def _token_save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.with_entropy, _ = inputs
    _, entropy_N, *others = output
    ctx.mark_non_differentiable(*others, *([] if ctx.with_entropy else [entropy_N]))
    ctx.save_for_backward(*output, *tensors)


def _token_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks it a single time
    results, tensors = list(saved[:4]), saved[4:]
    grad_entropy_N = grads[1] if ctx.with_entropy else None
    grad_logits_NV = token_logprobs_backward_op(grads[0], grad_entropy_N, results, *tensors)
    return grad_logits_NV, None, None, None, None


token_logprobs_op.register_autograd(_token_autograd, setup_context=_token_save)


# --------------------------------------------------------------- logprob_diff


# diff_N, and of the policy logps_N, max_N and log_sum_N for the backward.
DiffResults = tuple[Tensor, Tensor, Tensor, Tensor]


def diff_forward(
    logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, check: str
) -> DiffResults:
    check_labels(labels_N, logits_NV.shape[1], check, "logprob_diff")
    check_temperature(temperature)
    if paths.runs_triton(logits_NV, temperature):
        from stepagent.kernels.logprob_diff import logprob_diff

        return logprob_diff(logits_NV, ref_logits_NV, labels_N, temperature)
    logps_N, _, max_N, log_sum_N = _fold_rows(logits_NV, labels_N, temperature, False)
    ref_logps_N, *_ = _fold_rows(ref_logits_NV, labels_N, temperature, False)
    return logps_N - ref_logps_N, logps_N, max_N, log_sum_N


logprob_diff_op = torch.library.custom_op("stepagent::logprob_diff", diff_forward, mutates_args=())


@logprob_diff_op.register_fake
def _(
    logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, check: str
) -> DiffResults:
    return like_results(labels_N, temperature.dtype)


def _diff_save(ctx: Any, inputs: tuple[Any, ...], output: DiffResults) -> None:
    logits_NV, _, labels_N, temperature, _ = inputs
    _, *policy = output
    ctx.mark_non_differentiable(*policy)
    ctx.save_for_backward(*policy, logits_NV, labels_N, temperature)


def _diff_autograd(ctx: Any, grad_diff_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logps_N, max_N, log_sum_N, *tensors = ctx.saved_tensors
    # No gradient comes from an entropy, so its place among the results is not read.
    results = [logps_N, logps_N, max_N, log_sum_N]
    grad_logits_NV = token_logprobs_backward_op(grad_diff_N, None, results, *tensors)
    return grad_logits_NV, None, None, None, None


logprob_diff_op.register_autograd(_diff_autograd, setup_context=_diff_save)
