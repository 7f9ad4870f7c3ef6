"""`token_logprobs`: log-probs of labels under given logits. Torch, or on CUDA Triton.

The torch path upcasts a few rows of logits at a time. Results are computed and returned in float32,
for float64 inputs in float64; a gradient has the dtype of its input.

Dimensions: N tokens, V vocabulary; n tokens with a valid label.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from stepagent.checks import (
    LABEL_CHECKS,
    Index,
    as_temperature,
    check_choice,
    check_floats,
    check_label_values,
    check_temperature_values,
    compute_dtype,
)
from stepagent.ops import blocks, paths
from stepagent.ops.arguments import LabelCheck, LogitOptions, as_labels
from stepagent.ops.blocks import (
    RESULTS,
    Fold,
    Results,
    divide,
    like_results,
    per_token,
    scored,
    upstream_of,
)
from stepagent.ops.operator import Operator, Saved


@overload
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    return_entropy: Literal[False] = ...,
    **options: Unpack[LogitOptions],
) -> Tensor: ...
@overload
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    check_labels: LabelCheck = "device",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under given logits.

        z = logits / T,    log p_y = z_y − log Σ_j exp z_j

    Args:
        logits_NV: (N, V), any float dtype and strides; −inf forbids a token, NaN and +inf give NaN.
        labels_N: (N,) int32 or int64 in [0, V), or -100: log-prob 0, entropy 0, no gradient.
        temperature: T > 0, one for all or a float tensor (N,) on the same device; a constant.
        return_entropy: also return the entropy of each distribution.
        check_labels: as in `linear_logprobs`.

    Returns:
        logps_N, or (logps_N, entropy_N), in nats; float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_logprobs`.
    """
    check_floats(("logits_NV", logits_NV, 2))
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    labels_N = as_labels(logits_NV, labels_N)
    logps_N, entropy_N, *_ = token_logprobs_op(
        TokenInputs(
            logits_NV,
            labels_N,
            as_temperature(temperature, labels_N, compute_dtype(logits_NV)),
            with_entropy=return_entropy,
            check=check_labels,
        )
    )
    return (logps_N, entropy_N) if return_entropy else logps_N


class TokenInputs(NamedTuple):
    """Of the operator; as `token_logprobs` has checked them."""

    logits_NV: Tensor
    labels_N: Tensor
    temperature: Tensor  # () or (N,)
    with_entropy: bool
    check: str


def token_forward(given: TokenInputs) -> Results:
    logits_NV, labels_N, temperature, with_entropy, check = given
    check_label_values(labels_N, logits_NV.shape[1], check, "token_logprobs")
    check_temperature_values(temperature)
    if paths.runs_triton(logits_NV, temperature):
        from stepagent.kernels.token_logprobs import token_logprobs  # loads triton: only here

        return token_logprobs(logits_NV, labels_N, temperature, with_entropy=with_entropy)
    return fold_rows(logits_NV, labels_N, temperature, with_entropy)


def _row_chunks(tokens_n: Tensor, V: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The scored rows, as many at a time as the workspace holds; at least one."""
    rows = max(blocks.workspace_bytes(tokens_n.device) // (dtype.itemsize * V), 1)
    return iter(torch.split(tokens_n, rows))


def _chunk_logits(logits_NV: Tensor, temperature: Tensor, chunk_n: Tensor) -> Tensor:
    """A copy of these rows, upcast before the temperature divides them."""
    rows_nV = logits_NV[chunk_n].to(temperature.dtype)
    return divide(rows_nV, per_token(temperature, chunk_n), rows_nV)


def fold_rows(
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


def _fake(given: TokenInputs) -> Results:
    return like_results(given.labels_N, given.temperature.dtype)


token_logprobs_op = Operator("token_logprobs", TokenInputs, token_forward, _fake)


# ------------------------------------------------- the backward, also that of the diff


class TokenGradInputs(NamedTuple):
    grad_logps_N: Tensor
    grad_entropy_N: Tensor | None
    results: list[Tensor]
    logits_NV: Tensor
    labels_N: Tensor
    temperature: Tensor


def token_backward(given: TokenGradInputs) -> Tensor:
    """Gradient of logits_NV."""
    grad_logps_N, grad_entropy_N, results, logits_NV, labels_N, temperature = given
    if paths.runs_triton(logits_NV, temperature):
        from stepagent.kernels.token_logprobs import token_logprobs_backward

        return token_logprobs_backward(*given)
    grads = (grad_logps_N, grad_entropy_N)
    grad_logits_NV = torch.zeros_like(logits_NV)
    for chunk_n in _row_chunks(scored(labels_N), logits_NV.shape[1], temperature.dtype):
        chunk_temperature = per_token(temperature, chunk_n)
        upstream = upstream_of(chunk_n, labels_N[chunk_n], chunk_temperature, results, *grads)
        z_nV = _chunk_logits(logits_NV, temperature, chunk_n)
        grad_logits_NV[chunk_n] = upstream.grad_logits(z_nV, 0, z_nV).to(logits_NV.dtype)
    return grad_logits_NV


def _fake_gradient(given: TokenGradInputs) -> Tensor:
    return torch.empty_like(given.logits_NV)


token_logprobs_backward_op = Operator(
    "token_logprobs_backward", TokenGradInputs, token_backward, _fake_gradient
)


def logit_gradients(
    saved: Saved, grad_logps_N: Tensor, grad_entropy_N: Tensor | None
) -> Mapping[str, Tensor]:
    given = TokenGradInputs(
        grad_logps_N,
        grad_entropy_N,
        results=[saved.values[name] for name in RESULTS],
        **saved.those_of(TokenGradInputs),
    )
    return {"logits_NV": token_logprobs_backward_op(given)}


def _save(ctx: Any, given: TokenInputs, results: Results) -> Mapping[str, Any]:
    _, entropy_N, *constants = results
    ctx.mark_non_differentiable(*constants, *([] if given.with_entropy else [entropy_N]))
    return {**given._asdict(), **dict(zip(RESULTS, results, strict=True))}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    grad_logps_N, grad_entropy_N, *_ = saved.grads
    with_entropy = saved.values["with_entropy"]
    return logit_gradients(saved, grad_logps_N, grad_entropy_N if with_entropy else None)


token_logprobs_op.differentiate(_save, _backward)
