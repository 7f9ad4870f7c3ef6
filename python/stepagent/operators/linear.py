"""`linear_logprobs` and `linear_logprob_diff` as custom operators: log-probs from hidden rows.

    x = h · wᵀ + b,    z = cap · tanh(x / cap) / T

A hybrid on every device: the products are the math library's, one slice of the vocabulary at a
time in a bounded workspace, with float32 results; a fold of torch, or on CUDA of Triton, reads each
slice once. On Hopper, where the forward keeps nothing, one kernel does both (``fused_linear.py``).
What the backward needs of the logits is computed again, unless the forward keeps it:

    keep = "gradient"   ∂log p_y/∂h = (1 − p_y)/T · (s_y w_y − Σ_{j≠y} p_j s_j w_j / (1 − p_y)),
                        s the slope of the softcap. It does not depend on the loss: where the head
                        is frozen, the backward scales a row by its upstream gradient.
    keep = "logits"     the first slices of h · wᵀ, as many as fit the given number of bytes; on
                        CUDA, unasked, all of them where they fit a quarter of the free memory.

A frozen head goes through its tokens a chunk at a time on CUDA, so that slices of the vocabulary
stay wide.

On CPU, and wherever no `rows_N` is given, masked tokens are left out and shared rows multiplied
once; in the backward tokens without upstream gradient are left out too. To count them is a host
sync on CUDA, so with `rows_N` every token takes part there and nothing depends on values.

With `kept_NK` a token's distribution is over its own set: the logits of others count as −inf, after
the softcap. Products stay those of all the vocabulary, and what is kept of them is before the mask.

With a process group the head is one shard of the vocabulary: ranks exchange five numbers a token,
merge them in the order of ranks, and add up their gradients of h.

Results are computed and returned in float32, for float64 inputs in float64; a gradient has the
dtype of its input. Left out: gradients of gradients, gradients to the temperature.

Dimensions: N scored tokens, R hidden rows, H hidden size, V vocabulary (of this shard); n tokens
that take part, U hidden rows for them, w vocabulary entries in a slice.
"""

from typing import Any

import torch
from torch import Tensor

from stepagent.checks import IGNORE, check_kept, check_labels, check_rows, check_temperature
from stepagent.operators import paths
from stepagent.operators.blocks import (
    Fold,
    Results,
    Upstream,
    divide,
    like_results,
    spread,
    sum_rows,
    upstream_of,
)
from stepagent.operators.head import (
    WEIGHED,
    Head,
    Products,
    Tokens,
    add_product,
    full_precision,
    room_for_logits,
    select,
    write_product,
)
from stepagent.operators.shards import (
    local_labels,
    local_tokens,
    merge,
    sum_over,
    vocabulary,
)

# ------------------------------------------------------------------ forward


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


def _forward(
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


def _fused_is_faster(tokens: Tokens, head: Head) -> bool:
    if not head.triton:
        return False
    from stepagent.kernels.fused_linear import is_faster

    faster: bool = is_faster(tokens.hidden_UH, head.weight_VH, head.bias_V, head.softcap)
    return faster


def _fused(tokens: Tokens, head: Head, with_entropy: bool) -> Results:
    """One kernel in place of products and folds: a row's results are its own."""
    from stepagent.kernels.fused_linear import fused_linear_logprobs

    hidden_UH = tokens.hidden_UH.to(head.weight_VH.dtype)  # upcast for the library's products
    given = (tokens.labels_n, head.bias_V, tokens.temperature.squeeze(-1), head.softcap)
    results: Results = fused_linear_logprobs(
        hidden_UH, head.weight_VH, *given, with_entropy=with_entropy
    )
    return results


def linear_forward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    with_entropy: bool,
    keep: str,
    keep_bytes: int,
    group: str,
    check: str,
    batch_invariant: bool,
    kept_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Results of all tokens, and what is kept for the backward, flat."""
    _check(labels_N, weight_VH, temperature, group, check, "linear_logprobs")
    check_rows("rows_N", rows_N, "hidden_RH", hidden_RH.shape[0])
    V = weight_VH.shape[0]
    if kept_NK is not None:
        labels_N = check_kept(labels_N, kept_NK, vocabulary(V, group), check, "linear_logprobs")
    head = Head(weight_VH, bias_V, softcap, temperature.dtype)
    with full_precision(hidden_RH.device):
        kept_NK = local_tokens(kept_NK, V, group)
        tokens = select(hidden_RH, labels_N, rows_N, temperature, kept_NK)
        plain = keep == "nothing" and not group and kept_NK is None
        if batch_invariant or (plain and _fused_is_faster(tokens, head)):
            results, kept = _fused(tokens, head, with_entropy), temperature.new_empty(0)
        else:
            results, kept = _forward(tokens, head, with_entropy, keep, keep_bytes, group)
    return (*spread(results, tokens.positions_n, len(labels_N)), kept)


def _check(
    labels_N: Tensor, weight_VH: Tensor, temperature: Tensor, group: str, check: str, op: str
) -> None:
    check_labels(labels_N, vocabulary(weight_VH.shape[0], group), check, op)
    check_temperature(temperature)


# ------------------------------------------------------------------ backward


def _grad_slice(
    upstream: Upstream, tokens: Tokens, head: Head, part: slice, x_Uw: Tensor, room_Uw: Tensor
) -> Tensor:
    """Gradient of products, in the dtype of their factors. Overwrites `room_Uw`."""
    dtype = tokens.hidden_UH.dtype
    if head.triton:
        from stepagent.kernels.linear_logprobs import grad_slice

        return grad_slice(
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


def linear_backward(
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: list[Tensor],
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    kept: Tensor,
    keep: str,
    group: str,
    needs: list[bool],
    kept_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_RH, weight_VH and bias_V, in the order of `needs`."""
    needs_hidden, needs_weight, needs_bias = needs
    computed_again = keep != "gradient" and not len(kept)
    if computed_again and not (paths.on_gpu(hidden_RH) and rows_N is not None):
        labels_N = labels_N.masked_fill(_without_upstream(grad_logps_N, grad_entropy_N), IGNORE)
    head = Head(weight_VH, bias_V, softcap, temperature.dtype)
    grad_weight_VH = _gradient_of(weight_VH, needs_weight)
    grad_bias_V = _gradient_of(bias_V, needs_bias)
    with full_precision(hidden_RH.device):
        kept_NK = local_tokens(kept_NK, weight_VH.shape[0], group)
        tokens = select(hidden_RH, labels_N, rows_N, temperature, kept_NK)
        if keep == "gradient":
            grad_UH = tokens.rows_of(_scaled_rows(kept, grad_logps_N, tokens))
            return _scattered(grad_UH, tokens, hidden_RH), grad_weight_VH, grad_bias_V
        local_n = local_labels(tokens.labels_n, weight_VH.shape[0], group)
        upstream = upstream_of(
            tokens.positions_n, local_n, tokens.temperature, results, grad_logps_N, grad_entropy_N
        )
        grad_UH = torch.zeros_like(tokens.hidden_UH, dtype=head.dtype)
        for part, weight_wH, x_Uw, room_Uw in Products(tokens, head, kept, False):
            grad_x_Uw = _grad_slice(upstream, tokens, head, part, x_Uw, room_Uw)
            if needs_hidden:
                add_product(grad_UH, grad_x_Uw, weight_wH)
            if needs_weight:
                write_product(grad_x_Uw.T, tokens.hidden_UH, grad_weight_VH[part])
            if needs_bias:
                grad_bias_V[part] = grad_x_Uw.sum(0)
        if not needs_hidden:
            return _gradient_of(hidden_RH, False), grad_weight_VH, grad_bias_V
        sum_over(group, grad_UH)
    return _scattered(grad_UH, tokens, hidden_RH), grad_weight_VH, grad_bias_V


def _without_upstream(grad_logps_N: Tensor, grad_entropy_N: Tensor | None) -> Tensor:
    idle_N = grad_logps_N == 0
    return idle_N if grad_entropy_N is None else idle_N & (grad_entropy_N == 0)


def _scaled_rows(kept: Tensor, grad_logps_N: Tensor, tokens: Tokens) -> Tensor:
    """g ∂log p/∂h; 0 where g is, as where the logits are computed again."""
    grad_n = grad_logps_N if tokens.positions_n is None else grad_logps_N[tokens.positions_n]
    grad_n = grad_n.masked_fill(tokens.labels_n == IGNORE, 0.0)
    gradient_nH = kept.view(len(grad_n), tokens.hidden_UH.shape[1])
    return (gradient_nH * grad_n[:, None]).masked_fill_((grad_n == 0)[:, None], 0.0)


def _scattered(grad_UH: Tensor, tokens: Tokens, hidden_RH: Tensor) -> Tensor:
    """The gradient of all R rows; on a GPU rows may repeat among the U."""
    return sum_rows(grad_UH, tokens.rows_U, hidden_RH.shape[0]).to(hidden_RH.dtype)


def _gradient_of(tensor: Tensor | None, needed: bool) -> Tensor:
    """Room for a gradient, or no room where nobody needs it: an operator cannot return None."""
    return torch.empty_like(tensor) if tensor is not None and needed else torch.empty(0)


# ------------------------------------------------------------------ the operators


linear_logprobs_op = torch.library.custom_op(
    "stepagent::linear_logprobs", linear_forward, mutates_args=()
)
linear_logprobs_backward_op = torch.library.custom_op(
    "stepagent::linear_logprobs_backward", linear_backward, mutates_args=()
)


def _like_kept(labels_N: Tensor, dtype: torch.dtype, keep: str) -> Tensor:
    """Its shape, for the compiler: how many tokens take part is not known before the run."""
    size = 0 if keep == "nothing" else torch.library.get_ctx().new_dynamic_size()
    return labels_N.new_empty(size, dtype=dtype)


@linear_logprobs_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    labels_N, dtype, keep = inputs[2], inputs[5].dtype, inputs[8]
    return (*like_results(labels_N, dtype), _like_kept(labels_N, dtype, keep))


@linear_logprobs_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    hidden_RH, weight_VH, bias_V = inputs[3], inputs[4], inputs[7]
    needs = inputs[13]
    triple = zip((hidden_RH, weight_VH, bias_V), needs, strict=True)
    return tuple(_gradient_of(tensor, needed) for tensor, needed in triple)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softcap, ctx.with_entropy, ctx.keep, _, ctx.group, _, _, kept_NK = inputs
    _, entropy_N, *others = output
    ctx.mark_non_differentiable(*others, *([] if ctx.with_entropy else [entropy_N]))
    ctx.save_for_backward(*output, *tensors, kept_NK)


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    # Once: activation checkpointing unpacks what was saved a single time.
    saved = ctx.saved_tensors
    *results, kept = saved[:5]
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    grads_of = linear_logprobs_backward_op(
        grads[0],
        grads[1] if ctx.with_entropy else None,
        results,
        *saved[5:-1],
        ctx.softcap,
        kept,
        ctx.keep,
        ctx.group,
        needs,
        saved[-1],
    )
    hidden, weight, bias = (
        grad if needed else None for grad, needed in zip(grads_of, needs, strict=True)
    )
    return hidden, weight, None, None, bias, *[None] * 9


linear_logprobs_op.register_autograd(_autograd, setup_context=_save)


# ------------------------------------------------------------------ linear_logprob_diff


def diff_forward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    ref_rows_N: Tensor | None,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    keep: str,
    keep_bytes: int,
    group: str,
    check: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """diff_N; of the policy logps_N, max_N and log_sum_N; and what is kept for the backward."""
    _check(labels_N, weight_VH, temperature, group, check, "linear_logprob_diff")
    check_rows("rows_N", rows_N, "hidden_RH", hidden_RH.shape[0])
    check_rows("ref_rows_N", ref_rows_N, "ref_hidden_RH", ref_hidden_RH.shape[0])
    head = Head(weight_VH, bias_V, softcap, temperature.dtype)
    ref_head = Head(ref_weight_VH, ref_bias_V, softcap, temperature.dtype)
    with full_precision(hidden_RH.device):
        tokens = select(hidden_RH, labels_N, rows_N, temperature)
        ref_tokens = select(ref_hidden_RH, labels_N, ref_rows_N, temperature)
        if _same_head(head, ref_head) and keep != "logits":
            both, kept = _forward(
                _stacked(tokens, ref_tokens), head, False, keep, 0, group, len(tokens.labels_n)
            )
            results, ref_results = zip(*(result.chunk(2) for result in both), strict=True)
        else:
            results, kept = _forward(tokens, head, False, keep, keep_bytes, group)
            ref_results, _ = _forward(ref_tokens, ref_head, False, "nothing", 0, group)
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


linear_logprob_diff_op = torch.library.custom_op(
    "stepagent::linear_logprob_diff", diff_forward, mutates_args=()
)


@linear_logprob_diff_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    labels_N, dtype, keep = inputs[4], inputs[9].dtype, inputs[11]
    return (*like_results(labels_N, dtype), _like_kept(labels_N, dtype, keep))


def _diff_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, labels_N, rows_N, _, bias_V, _, temperature, *options = inputs
    ctx.softcap, ctx.keep, _, ctx.group, _ = options
    ctx.mark_non_differentiable(*output[1:])
    tensors = (hidden, weight, labels_N, rows_N, bias_V, temperature)
    ctx.save_for_backward(*output[1:], *tensors)


def _diff_autograd(ctx: Any, grad_diff_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logps_N, max_N, log_sum_N, kept, *tensors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 7)]
    # No gradient comes from an entropy, so its place among the results is not read.
    results = [logps_N, logps_N, max_N, log_sum_N]
    grads_of = linear_logprobs_backward_op(
        grad_diff_N, None, results, *tensors, ctx.softcap, kept, ctx.keep, ctx.group, needs
    )
    hidden, weight, bias = (
        grad if needed else None for grad, needed in zip(grads_of, needs, strict=True)
    )
    return hidden, weight, *[None] * 5, bias, *[None] * 7


linear_logprob_diff_op.register_autograd(_diff_autograd, setup_context=_diff_save)
