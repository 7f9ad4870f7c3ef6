"""`logprob_diff`: log-ratios of labels under two models' logits. Torch, or on CUDA Triton.

As ``tokens.py``, whose backward it has.

Dimensions: N tokens, V vocabulary.
"""

from collections.abc import Mapping
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
    check_pair,
    check_temperature_values,
    compute_dtype,
)
from stepagent.ops import paths
from stepagent.ops.arguments import LabelCheck, LogitOptions, as_labels
from stepagent.ops.blocks import RESULTS, like_results
from stepagent.ops.kl import k3
from stepagent.ops.operator import Operator, Saved
from stepagent.ops.tokens import fold_rows, logit_gradients


@overload
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    return_kl: Literal[False] = ...,
    **options: Unpack[LogitOptions],
) -> Tensor: ...
@overload
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    return_kl: Literal[True],
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, Tensor]: ...
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = 1.0,
    return_kl: bool = False,
    check_labels: LabelCheck = "device",
) -> Tensor | tuple[Tensor, Tensor]:
    """log π(y) − log π_ref(y) of each label; the gradient goes to `logits_NV` only.

    Args:
        logits_NV, ref_logits_NV: (N, V), any float dtypes and strides.
        labels_N, temperature: as `token_logprobs`; temperature applies to both. Label -100 gives 0.
        return_kl: also return exp(−diff) − 1 + diff >= 0, the k3 estimate of KL(π ‖ π_ref) for
            labels sampled from π; its gradient flows too. Where diff < −40, exp(−diff) goes on
            along its tangent, as exp overflows float32: the estimate stays finite and so does its
            gradient.
        check_labels: as in `linear_logprobs`.

    Returns:
        diff_N, or (diff_N, kl_N), in nats; float32, float64 where one of the logits is float64.

    Raises:
        TypeError, ValueError, NotImplementedError: as `token_logprobs`; ValueError when the two
            shapes differ.
    """
    check_floats(("logits_NV", logits_NV, 2))
    check_floats(("ref_logits_NV", ref_logits_NV, 2))
    check_pair("logits_NV", logits_NV, "ref_logits_NV", ref_logits_NV)
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    labels_N = as_labels(logits_NV, labels_N)
    dtype = torch.promote_types(compute_dtype(logits_NV), compute_dtype(ref_logits_NV))
    diff_N, *_ = logprob_diff_op(
        TokenDiffInputs(
            logits_NV,
            ref_logits_NV.detach(),
            labels_N,
            as_temperature(temperature, labels_N, dtype),
            check=check_labels,
        )
    )
    return (diff_N, k3(diff_N)) if return_kl else diff_N


class TokenDiffInputs(NamedTuple):
    """Of the operator; as `logprob_diff` has checked them."""

    logits_NV: Tensor
    ref_logits_NV: Tensor
    labels_N: Tensor
    temperature: Tensor  # () or (N,)
    check: str


# diff_N, and of the policy logps_N, max_N and log_sum_N for the backward.
DiffResults = tuple[Tensor, Tensor, Tensor, Tensor]


def diff_forward(given: TokenDiffInputs) -> DiffResults:
    logits_NV, ref_logits_NV, labels_N, temperature, check = given
    check_label_values(labels_N, logits_NV.shape[1], check, "logprob_diff")
    check_temperature_values(temperature)
    if paths.runs_triton(logits_NV, temperature):
        from stepagent.kernels.logprob_diff import logprob_diff  # loads triton: only here

        return logprob_diff(logits_NV, ref_logits_NV, labels_N, temperature)
    logps_N, _, max_N, log_sum_N = fold_rows(logits_NV, labels_N, temperature, False)
    ref_logps_N, *_ = fold_rows(ref_logits_NV, labels_N, temperature, False)
    return logps_N - ref_logps_N, logps_N, max_N, log_sum_N


def _fake(given: TokenDiffInputs) -> DiffResults:
    return like_results(given.labels_N, given.temperature.dtype)


logprob_diff_op = Operator("logprob_diff", TokenDiffInputs, diff_forward, _fake)


def _save(ctx: Any, given: TokenDiffInputs, results: DiffResults) -> Mapping[str, Any]:
    _, logps_N, *others = results
    ctx.mark_non_differentiable(logps_N, *others)
    policy = {k: v for k, v in given._asdict().items() if not k.startswith("ref_")}
    # No gradient comes from an entropy, so its place among the results is not read.
    return {**policy, **dict(zip(RESULTS, (logps_N, logps_N, *others), strict=True))}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    return logit_gradients(saved, saved.grads[0], None)


logprob_diff_op.differentiate(_save, _backward)
