"""A head's products, slice by slice: folded into log-probs, and their gradients.

A fold of torch, or on CUDA of Triton, reads each slice of products once. ``linear.py`` says what is
kept.

Dimensions: n tokens that take part, U hidden rows for them, H hidden size, V vocabulary (of this
shard), w vocabulary entries in a slice.
"""

import torch
from torch import Tensor

from stepagent.ops.blocks import Fold, Results, Upstream, divide
from stepagent.ops.head import WEIGHED, Head, Products, Tokens, add_product, room_for_logits
from stepagent.ops.shards import local_labels, merge, sum_over


def _fold_slice(
    fold: Fold,
    tokens: Tokens,
    head: Head,
    part: slice,
    x_Uw: Tensor,
    room_Uw: Tensor,
    with_slope: bool,
) -> Tensor | None:
    """Fold products; with_slope: returns exp(z − max) times the slope. Overwrites `room_Uw`."""
    if head.triton:
        x_nw = tokens.restricted(x_Uw, part, room_Uw)
        return _fold_slice_by_triton(fold, tokens, head, part, x_nw, with_slope)
    x_nw = tokens.logits_of(head.capped(x_Uw, part, room_Uw))
    room_nw = room_Uw if tokens.row_n is None else x_nw
    slope_nw = head.slope(x_nw) if with_slope else None
    x_nw = tokens.restricted(x_nw, part, room_nw)
    z_nw = divide(x_nw, tokens.temperature, room_nw)
    exp_nw = fold.update(z_nw, part.start, room_nw)
    return exp_nw if slope_nw is None else exp_nw.mul_(slope_nw)


def _fold_slice_by_triton(
    fold: Fold, tokens: Tokens, head: Head, part: slice, x_nw: Tensor, with_slope: bool
) -> Tensor | None:
    from stepagent.kernels.linear_logprobs import fold_slice, weigh_slice  # loads triton: only here

    products = (x_nw, head.bias_w(part), tokens.temperature, head.softcap, part.start)
    if with_slope:
        state = (fold.max_n, fold.sum_n, fold.label_n, fold.shrink_n)
        weights_nw: Tensor = weigh_slice(
            fold.labels_n, state, *products, dtype=tokens.hidden_UH.dtype
        )
        return weights_nw
    state = (fold.max_n, fold.sum_n, fold.moment_n, fold.label_n)
    fold_slice(fold.labels_n, state, *products, with_entropy=fold.with_entropy)
    return None


def _fold_all(
    tokens: Tokens, head: Head, labels_n: Tensor, with_entropy: bool, kept: Tensor, pulled: int
) -> tuple[Fold, Tensor]:
    """Fold every slice; Σ_{j≠y} exp(z_j − max) s_j w_j, (pulled, H), of the first tokens."""
    fold = Fold(labels_n, head.dtype, with_entropy)
    device, H = tokens.hidden_UH.device, tokens.hidden_UH.shape[1]
    pull_nH = torch.zeros(pulled, H, dtype=head.dtype, device=device)
    widest = WEIGHED if pulled else None
    for part, weight_wH, x_Uw, room_Uw in Products(tokens, head, kept, True, widest):
        exp_slope_nw = _fold_slice(fold, tokens, head, part, x_Uw, room_Uw, pulled > 0)
        if exp_slope_nw is not None and pulled:
            pull_nH.mul_(fold.shrink_n[:pulled, None])
            add_product(pull_nH, exp_slope_nw[:pulled], weight_wH)
    return fold, pull_nH


def _gradient_nH(
    tokens: Tokens, head: Head, fold: Fold, whole: Fold, logps_n: Tensor, pull_nH: Tensor
) -> Tensor:
    """∂log p_y/∂h of the first tokens: of this shard's labels, where the head is one."""
    n, V = len(pull_nH), head.weight_VH.shape[0]
    temperature = tokens.temperature[:n] if tokens.temperature.ndim else tokens.temperature
    share_n = torch.exp(fold.max_n - whole.max_n)[:n] / whole.sum_n[:n]
    pull_nH.mul_(share_n[:, None]).masked_fill_((whole.sum_n[:n] == 0)[:, None], 0.0)
    labels_n = fold.labels_n[:n]
    here_n = (labels_n >= 0) & (labels_n < V)
    own_nH = head.weight_VH[torch.where(here_n, labels_n, 0)].to(head.dtype)
    slope_n1 = head.slope(whole.label_n[:n, None] * temperature)
    if slope_n1 is not None:
        own_nH.mul_(slope_n1)
    own_nH.masked_fill_(~here_n[:, None], 0.0)
    return own_nH.sub_(pull_nH).mul_(-torch.expm1(logps_n[:n, None]) / temperature)


def fold_tokens(
    tokens: Tokens,
    head: Head,
    with_entropy: bool,
    keep: str,
    keep_bytes: int,
    group: str,
    learners: int | None = None,
) -> tuple[Results, Tensor]:
    """Results, and what is kept for the backward of the first `learners` tokens, else of all."""
    if keep != "gradient":
        results, kept = _forward_chunk(tokens, head, with_entropy, keep, keep_bytes, group, 0)
        return results, kept.flatten()
    learners = len(tokens.labels_n) if learners is None else learners
    parts = []
    for chunk in tokens.chunks():
        pulled = min(len(chunk.labels_n), learners)
        parts.append(_forward_chunk(chunk, head, with_entropy, keep, 0, group, pulled))
        learners -= pulled
    if len(parts) == 1:
        ((results, kept),) = parts
        return results, kept.flatten()
    a, b, c, d = map(torch.cat, zip(*(results for results, _ in parts), strict=True))
    return (a, b, c, d), torch.cat([kept for _, kept in parts]).flatten()


def _forward_chunk(
    tokens: Tokens,
    head: Head,
    with_entropy: bool,
    keep: str,
    keep_bytes: int,
    group: str,
    pulled: int,
) -> tuple[Results, Tensor]:
    """Results, and the products that are kept, or the gradient (pulled, H) of the first tokens."""
    V = head.weight_VH.shape[0]
    labels_n = local_labels(tokens.labels_n, V, group)
    kept = room_for_logits(tokens, head, keep_bytes if keep == "logits" else 0)
    fold, pull_nH = _fold_all(tokens, head, labels_n, with_entropy, kept, pulled)
    whole = merge(fold, tokens.labels_n, V, group) if group else fold
    results = _finish(whole, head)
    if keep == "gradient":
        kept = _gradient_nH(tokens, head, fold, whole, results[0], pull_nH)
        sum_over(group, kept)
    return results, kept


def _finish(fold: Fold, head: Head) -> Results:
    if not head.triton:
        return fold.finish()
    from stepagent.kernels.linear_logprobs import finish

    state = (fold.max_n, fold.sum_n, fold.moment_n, fold.label_n)
    results: Results = finish(fold.labels_n, state, with_entropy=fold.with_entropy)
    return results


def fused_is_faster(tokens: Tokens, head: Head) -> bool:
    if not head.triton:
        return False
    from stepagent.kernels.fused_linear import is_faster

    faster: bool = is_faster(tokens.hidden_UH, head.weight_VH, head.bias_V, head.softcap)
    return faster


def fused(tokens: Tokens, head: Head, with_entropy: bool) -> Results:
    """One kernel in place of products and folds: a row's results are its own."""
    from stepagent.kernels.fused_linear import fused_linear_logprobs

    hidden_UH = tokens.hidden_UH.to(head.weight_VH.dtype)  # upcast for the library's products
    given = (tokens.labels_n, head.bias_V, tokens.temperature.squeeze(-1), head.softcap)
    results: Results = fused_linear_logprobs(
        hidden_UH, head.weight_VH, *given, with_entropy=with_entropy
    )
    return results


def grad_slice(
    upstream: Upstream, tokens: Tokens, head: Head, part: slice, x_Uw: Tensor, room_Uw: Tensor
) -> Tensor:
    """Gradient of products, in the dtype of their factors. Overwrites `room_Uw`."""
    dtype = tokens.hidden_UH.dtype
    if head.triton:
        from stepagent.kernels import linear_logprobs as kernels

        return kernels.grad_slice(
            upstream.labels_n,
            (upstream.logps_n, upstream.entropy_n, upstream.max_n, upstream.log_sum_n),
            upstream.grad_logps_n,
            upstream.grad_entropy_n,
            tokens.restricted(x_Uw, part, room_Uw),
            head.bias_w(part),
            tokens.temperature,
            head.softcap,
            part.start,
            dtype=dtype,
        )
    capped_Uw = head.capped(x_Uw, part, room_Uw)
    slope_Uw = head.slope(capped_Uw)
    x_nw = tokens.logits_of(capped_Uw)
    room_nw = room_Uw if tokens.row_n is None else x_nw
    x_nw = tokens.restricted(x_nw, part, room_nw)
    z_nw = divide(x_nw, tokens.temperature, room_nw)
    grad_x_Uw = tokens.rows_of(upstream.grad_logits(z_nw, part.start, room_nw))
    return (grad_x_Uw if slope_Uw is None else grad_x_Uw.mul_(slope_Uw)).to(dtype)
