"""`linear_logprob_diff`: log-ratios of labels from the hidden rows and heads of two models.

Where both have one head, their rows are stacked and it is read once; else the reference's head is
folded after the policy's. The backward is that of ``linear.py``.

Dimensions: N scored tokens, R hidden rows, H hidden size, V vocabulary (of this shard).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stepagent.checks import (
    LABEL_CHECKS,
    Index,
    as_temperature,
    check_choice,
    check_floats,
    check_label_values,
    check_positive,
    check_rows,
    check_temperature_values,
    compute_dtype,
)
from stepagent.ops.arguments import (
    HeadOptions,
    LabelCheck,
    as_head,
    as_labelled_rows,
    what_to_keep,
)
from stepagent.ops.blocks import RESULTS, like_results, spread
from stepagent.ops.folds import fold_tokens
from stepagent.ops.head import Head, Tokens, full_precision, select
from stepagent.ops.kl import k3
from stepagent.ops.linear import LinearResults, head_gradients, like_kept
from stepagent.ops.operator import Operator, Saved
from stepagent.ops.shards import vocabulary


class LinearDiffOptions(HeadOptions, total=False):
    ref_rows_N: Index | None
    ref_bias_V: Tensor | None


@overload
def linear_logprob_diff(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    labels_N: Index,
    *,
    return_kl: Literal[False] = ...,
    **options: Unpack[LinearDiffOptions],
) -> Tensor: ...
@overload
def linear_logprob_diff(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    labels_N: Index,
    *,
    return_kl: Literal[True],
    **options: Unpack[LinearDiffOptions],
) -> tuple[Tensor, Tensor]: ...
def linear_logprob_diff(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    labels_N: Index,
    *,
    rows_N: Index | None = None,
    ref_rows_N: Index | None = None,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_kl: bool = False,
    group: ProcessGroup | None = None,
    keep_bytes: int | None = None,
    check_labels: LabelCheck = "device",
) -> Tensor | tuple[Tensor, Tensor]:
    """log π(y) − log π_ref(y) of each label, both from hidden rows and a head; no N×V logits.

    Where the two heads are one tensor (an adapter on or off), their rows share one product. The
    gradient goes to `hidden_RH`, `weight_VH` and `bias_V` only.

    Args:
        hidden_RH, weight_VH, labels_N, rows_N, bias_V: the policy's, as in `linear_logprobs`.
        ref_hidden_RH, ref_weight_VH, ref_rows_N, ref_bias_V: the reference's, which predict the
            same labels; it may have other R and H, the same V and dtype.
        temperature, softcap, keep_bytes, group, check_labels: as in `linear_logprobs`, for both.
        return_kl: as in `logprob_diff`.

    Returns:
        diff_N, or (diff_N, kl_N), in nats; float32, for float64 inputs float64. Label -100 gives 0.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_logprobs`.
    """
    hidden_RH, weight_VH, bias_V = as_head("", hidden_RH, weight_VH, bias_V)
    ref_bias_V = None if ref_bias_V is None else ref_bias_V.detach()
    ref_hidden_RH, ref_weight_VH, ref_bias_V = as_head(
        "ref_", ref_hidden_RH.detach(), ref_weight_VH.detach(), ref_bias_V
    )
    labels_N, rows_N = as_labelled_rows("", hidden_RH, labels_N, rows_N)
    _, ref_rows_N = as_labelled_rows("ref_", ref_hidden_RH, labels_N, ref_rows_N)
    check_floats(("hidden_RH", hidden_RH, 2), ("ref_hidden_RH", ref_hidden_RH, 2))
    if ref_weight_VH.shape[0] != weight_VH.shape[0]:
        sizes = f"{weight_VH.shape[0]} and {ref_weight_VH.shape[0]}"
        raise ValueError(f"weight_VH and ref_weight_VH must share one vocabulary, got V = {sizes}")
    if softcap is not None:
        check_positive("softcap", softcap)
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    keep, kept_bytes = what_to_keep(hidden_RH, weight_VH, bias_V, False, keep_bytes)
    diff_N, *_ = linear_logprob_diff_op(
        LinearDiffInputs(
            hidden_RH,
            weight_VH,
            ref_hidden_RH,
            ref_weight_VH,
            labels_N,
            rows_N,
            ref_rows_N,
            bias_V,
            ref_bias_V,
            as_temperature(temperature, labels_N, compute_dtype(hidden_RH)),
            softcap,
            keep=keep,
            keep_bytes=kept_bytes,
            group="" if group is None else group.group_name,
            check=check_labels,
        )
    )
    return (diff_N, k3(diff_N)) if return_kl else diff_N


class LinearDiffInputs(NamedTuple):
    """Of the operator; as `linear_logprob_diff` has checked them."""

    hidden_RH: Tensor
    weight_VH: Tensor
    ref_hidden_RH: Tensor
    ref_weight_VH: Tensor
    labels_N: Tensor
    rows_N: Tensor | None
    ref_rows_N: Tensor | None
    bias_V: Tensor | None
    ref_bias_V: Tensor | None
    temperature: Tensor  # () or (N,)
    softcap: float | None
    keep: str
    keep_bytes: int
    group: str
    check: str


def diff_forward(given: LinearDiffInputs) -> LinearResults:
    """diff_N; of the policy logps_N, max_N and log_sum_N; and what is kept for the backward."""
    labels_N, temperature, keep, group = (
        given.labels_N,
        given.temperature,
        given.keep,
        given.group,
    )
    whole = vocabulary(given.weight_VH.shape[0], group)
    check_label_values(labels_N, whole, given.check, "linear_logprob_diff")
    check_temperature_values(temperature)
    check_rows("rows_N", given.rows_N, "hidden_RH", given.hidden_RH.shape[0])
    check_rows("ref_rows_N", given.ref_rows_N, "ref_hidden_RH", given.ref_hidden_RH.shape[0])
    head = Head(given.weight_VH, given.bias_V, given.softcap, temperature.dtype)
    ref_head = Head(given.ref_weight_VH, given.ref_bias_V, given.softcap, temperature.dtype)
    with full_precision(given.hidden_RH.device):
        tokens = select(given.hidden_RH, labels_N, given.rows_N, temperature)
        ref_tokens = select(given.ref_hidden_RH, labels_N, given.ref_rows_N, temperature)
        if _same_head(head, ref_head) and keep != "logits":
            both, kept = fold_tokens(
                _stacked(tokens, ref_tokens), head, False, keep, 0, group, len(tokens.labels_n)
            )
            results, ref_results = zip(*(result.chunk(2) for result in both), strict=True)
        else:
            results, kept = fold_tokens(tokens, head, False, keep, given.keep_bytes, group)
            ref_results, _ = fold_tokens(ref_tokens, ref_head, False, "nothing", 0, group)
        logps_n, _, max_n, log_sum_n = results
        wanted = (logps_n - ref_results[0], logps_n, max_n, log_sum_n)
    return (*spread(wanted, tokens.positions_n, len(labels_N)), kept)


def _same_head(head: Head, ref_head: Head) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        places = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (a, b))
        return len(set(places)) == 1

    return same(head.weight_VH, ref_head.weight_VH) and same(head.bias_V, ref_head.bias_V)


def _stacked(tokens: Tokens, ref_tokens: Tokens) -> Tokens:
    """Rows of policy and reference in one product, so that the head is read once."""
    pair = (tokens, ref_tokens)
    row_n = None
    if tokens.row_n is not None or ref_tokens.row_n is not None:
        U, device = tokens.hidden_UH.shape[0], tokens.labels_n.device
        own = [
            t.row_n if t.row_n is not None else torch.arange(len(t.rows_U), device=device)
            for t in pair
        ]
        row_n = torch.cat([own[0], own[1] + U])
    return Tokens(
        None,  # twice those of either
        torch.cat([t.labels_n for t in pair]),
        torch.cat([t.temperature for t in pair]) if tokens.temperature.ndim else tokens.temperature,
        torch.cat([t.rows_U for t in pair]),
        row_n,
        torch.cat([t.hidden_UH for t in pair]),
    )


def _fake(given: LinearDiffInputs) -> LinearResults:
    labels_N, dtype = given.labels_N, given.temperature.dtype
    return (*like_results(labels_N, dtype), like_kept(labels_N, dtype, given.keep))


linear_logprob_diff_op = Operator("linear_logprob_diff", LinearDiffInputs, diff_forward, _fake)


def _save(ctx: Any, given: LinearDiffInputs, results: LinearResults) -> Mapping[str, Any]:
    _, logps_N, *others = results
    ctx.mark_non_differentiable(logps_N, *others)
    policy = {k: v for k, v in given._asdict().items() if not k.startswith("ref_")}
    # No gradient comes from an entropy, so its place among the results is not read.
    named = zip((*RESULTS, "kept"), (logps_N, logps_N, *others), strict=True)
    return {**policy, **dict(named)}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    return head_gradients(saved, saved.grads[0], None)


linear_logprob_diff_op.differentiate(_save, _backward)
