"""`linear_logprobs`: log-probs from hidden rows and a head.

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

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stepagent.checks import (
    IGNORE,
    LABEL_CHECKS,
    Index,
    as_index,
    as_temperature,
    check_choice,
    check_kept,
    check_label_values,
    check_length,
    check_positive,
    check_rows,
    check_temperature_values,
    compute_dtype,
)
from stepagent.ops import paths
from stepagent.ops.arguments import (
    HeadOptions,
    LabelCheck,
    as_head,
    as_labelled_rows,
    what_to_keep,
)
from stepagent.ops.blocks import (
    RESULTS,
    like_results,
    spread,
    sum_rows,
    upstream_of,
)
from stepagent.ops.folds import fold_tokens, fused, fused_is_faster, grad_slice
from stepagent.ops.head import (
    Head,
    Products,
    Tokens,
    add_product,
    full_precision,
    select,
    write_product,
)
from stepagent.ops.operator import Operator, Saved
from stepagent.ops.shards import local_labels, local_tokens, sum_over, vocabulary


class LinearOptions(HeadOptions, total=False):
    kept_NK: Index | None
    batch_invariant: bool


@overload
def linear_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Index,
    *,
    return_entropy: Literal[False] = ...,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Index,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Tensor]: ...
def linear_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Index,
    *,
    rows_N: Index | None = None,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    kept_NK: Index | None = None,
    return_entropy: bool = False,
    group: ProcessGroup | None = None,
    keep_bytes: int | None = None,
    check_labels: LabelCheck = "device",
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under a language-model head, without the N×V logits.

        x = h · wᵀ + b,    z = cap · tanh(x / cap) / T,    log p_y = z_y − log Σ_j exp z_j

    Only rows that a valid label names go through the head, each of them once. On CUDA that takes a
    host sync to count them, where `rows_N` is None; with `rows_N` there is none, and all N rows
    that it names are multiplied. Inside autocast the factors of the product are cast as a linear
    layer's are; nothing after them is rounded.

    Args:
        hidden_RH: (R, H), any float dtype.
        weight_VH: (V, H), dtype of `hidden_RH`. Where neither it nor `bias_V` requires grad, the
            forward leaves the gradient of `hidden_RH` ready: 4NHV operations in all, not 6NHV.
        labels_N: (N,) int32 or int64 in [0, V), or -100: log-prob 0, entropy 0, no gradient.
        rows_N: (N,) int32 or int64 in [0, R): `hidden_RH[rows_N[n]]` predicts label n; rows may
            repeat. By default N = R and row n predicts label n.
        bias_V: (V,), dtype of `hidden_RH`.
        temperature: T > 0, one for all or a float tensor (N,) on the same device; a constant.
        softcap: cap > 0, or None for z = x / T.
        kept_NK: (N, K) int32 or int64 in [0, V): the tokens that label n was drawn from, as top-k
            and top-p sampling leave them, in any order; -1 where there are fewer. The distribution
            is over these; others get no gradient. A label other than -100 must be among its own:
            on CPU, or with `check_labels="sync"`, it is a ValueError that names it; on CUDA it
            scores NaN. None: all tokens. Not with `batch_invariant`.
        return_entropy: also return the entropy of each predicted distribution.
        group: ranks that each hold an equal shard of the vocabulary, in the order of ranks; V is
            then the size of the shard in `weight_VH` and `bias_V`, labels are of the whole
            vocabulary, and everything but the shard is the same on all ranks. The gradient of
            `hidden_RH` is summed over the ranks.
        keep_bytes: for a head that learns, memory in which the forward may keep logits for the
            backward, which then computes fewer of them again: 6NHV where all fit, else up to 8NHV.
            By default all of them on CUDA, where they fit a quarter of its free memory, else none.
        check_labels: what happens to a label outside [0, V). On CPU it is a ValueError that names
            it; on CUDA "device" is an assertion there that names the rule, "sync" the ValueError at
            the price of a host sync. "off": it scores NaN.
        batch_invariant: a row's results do not depend, to the bit, on what else is in the batch:
            one Triton kernel for the whole forward. On a GPU only; not with `group`.

    Returns:
        logps_N, or (logps_N, entropy_N), in nats; float32, for float64 inputs float64.
        Differentiable in `hidden_RH`, `weight_VH` and `bias_V`.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: a shape, device, label, row, temperature or softcap that breaks these rules. On
            CUDA, where looking at values would stall the stream, those of a temperature tensor are
            not checked.
        NotImplementedError: an input with a forward-mode tangent.
    """
    hidden_RH, weight_VH, bias_V = as_head("", hidden_RH, weight_VH, bias_V)
    labels_N, rows_N = as_labelled_rows("", hidden_RH, labels_N, rows_N)
    if kept_NK is not None:
        kept_NK = as_index("kept_NK", kept_NK, hidden_RH.device, ndim=2)
        check_length("kept_NK", kept_NK, labels_N.shape[0], "labels_N")
    if softcap is not None:
        check_positive("softcap", softcap)
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    keep, kept_bytes = what_to_keep(hidden_RH, weight_VH, bias_V, return_entropy, keep_bytes)
    if batch_invariant:
        _check_batch_invariance(hidden_RH, group, kept_NK)
        keep, kept_bytes = "nothing", 0
    logps_N, entropy_N, *_ = linear_logprobs_op(
        LinearInputs(
            hidden_RH,
            weight_VH,
            labels_N,
            rows_N,
            bias_V,
            as_temperature(temperature, labels_N, compute_dtype(hidden_RH)),
            softcap,
            with_entropy=return_entropy,
            keep=keep,
            keep_bytes=kept_bytes,
            group="" if group is None else group.group_name,
            check=check_labels,
            batch_invariant=batch_invariant,
            kept_NK=kept_NK,
        )
    )
    return (logps_N, entropy_N) if return_entropy else logps_N


def _check_batch_invariance(
    hidden_RH: Tensor, group: ProcessGroup | None, kept_NK: Tensor | None
) -> None:
    if not paths.runs_triton(hidden_RH):
        raise ValueError(
            "hidden_RH must be float32 or a half on a GPU for batch_invariant=True, which needs "
            "Triton's kernel (a math library rounds a row by the rows beside it), got "
            f"{hidden_RH.dtype} on {hidden_RH.device}"
        )
    if group is not None:
        raise ValueError("group must be None with batch_invariant=True: its kernel knows no shards")
    if kept_NK is not None:
        raise ValueError("kept_NK must be None with batch_invariant=True: its kernel knows no sets")


class LinearInputs(NamedTuple):
    """Of the operator; as `linear_logprobs` has checked them."""

    hidden_RH: Tensor
    weight_VH: Tensor
    labels_N: Tensor
    rows_N: Tensor | None
    bias_V: Tensor | None
    temperature: Tensor  # () or (N,)
    softcap: float | None
    with_entropy: bool
    keep: str
    keep_bytes: int
    group: str
    check: str
    batch_invariant: bool
    kept_NK: Tensor | None = None


# Those of blocks.Results, and what is kept for the backward, flat.
LinearResults = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def linear_forward(given: LinearInputs) -> LinearResults:
    hidden_RH, weight_VH, labels_N, rows_N, bias_V, temperature, softcap, *_ = given
    whole = vocabulary(weight_VH.shape[0], given.group)
    check_label_values(labels_N, whole, given.check, "linear_logprobs")
    check_temperature_values(temperature)
    check_rows("rows_N", rows_N, "hidden_RH", hidden_RH.shape[0])
    V, kept_NK, group = weight_VH.shape[0], given.kept_NK, given.group
    if kept_NK is not None:
        labels_N = check_kept(labels_N, kept_NK, whole, given.check, "linear_logprobs")
    head = Head(weight_VH, bias_V, softcap, temperature.dtype)
    with full_precision(hidden_RH.device):
        kept_NK = local_tokens(kept_NK, V, group)
        tokens = select(hidden_RH, labels_N, rows_N, temperature, kept_NK)
        plain = given.keep == "nothing" and not group and kept_NK is None
        if given.batch_invariant or (plain and fused_is_faster(tokens, head)):
            results = fused(tokens, head, given.with_entropy)
            kept = temperature.new_empty(0)
        else:
            results, kept = fold_tokens(
                tokens, head, given.with_entropy, given.keep, given.keep_bytes, group
            )
    return (*spread(results, tokens.positions_n, len(labels_N)), kept)


def like_kept(labels_N: Tensor, dtype: torch.dtype, keep: str) -> Tensor:
    """Its shape, for the compiler: how many tokens take part is not known before the run."""
    size = 0 if keep == "nothing" else torch.library.get_ctx().new_dynamic_size()
    return labels_N.new_empty(size, dtype=dtype)


def _fake(given: LinearInputs) -> LinearResults:
    labels_N, dtype = given.labels_N, given.temperature.dtype
    return (*like_results(labels_N, dtype), like_kept(labels_N, dtype, given.keep))


linear_logprobs_op = Operator("linear_logprobs", LinearInputs, linear_forward, _fake)


# ------------------------------------------------- the backward, also that of the diff


class LinearGradInputs(NamedTuple):
    grad_logps_N: Tensor
    grad_entropy_N: Tensor | None
    results: list[Tensor]
    hidden_RH: Tensor
    weight_VH: Tensor
    labels_N: Tensor
    rows_N: Tensor | None
    bias_V: Tensor | None
    temperature: Tensor
    softcap: float | None
    kept: Tensor
    keep: str
    group: str
    needs: list[bool]
    kept_NK: Tensor | None = None


def linear_backward(given: LinearGradInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_RH, weight_VH and bias_V, in the order of `needs`."""
    grad_logps_N, grad_entropy_N, results, hidden_RH, weight_VH, *_ = given
    labels_N, rows_N, temperature, kept = (
        given.labels_N,
        given.rows_N,
        given.temperature,
        given.kept,
    )
    needs_hidden, needs_weight, needs_bias = given.needs
    computed_again = given.keep != "gradient" and not len(kept)
    if computed_again and not (paths.on_gpu(hidden_RH) and rows_N is not None):
        labels_N = labels_N.masked_fill(_without_upstream(grad_logps_N, grad_entropy_N), IGNORE)
    head = Head(weight_VH, given.bias_V, given.softcap, temperature.dtype)
    grad_weight_VH = _gradient_of(weight_VH, needs_weight)
    grad_bias_V = _gradient_of(given.bias_V, needs_bias)
    with full_precision(hidden_RH.device):
        kept_NK = local_tokens(given.kept_NK, weight_VH.shape[0], given.group)
        tokens = select(hidden_RH, labels_N, rows_N, temperature, kept_NK)
        if given.keep == "gradient":
            grad_UH = tokens.rows_of(_scaled_rows(kept, grad_logps_N, tokens))
            return _scattered(grad_UH, tokens, hidden_RH), grad_weight_VH, grad_bias_V
        local_n = local_labels(tokens.labels_n, weight_VH.shape[0], given.group)
        upstream = upstream_of(
            tokens.positions_n, local_n, tokens.temperature, results, grad_logps_N, grad_entropy_N
        )
        grad_UH = torch.zeros_like(tokens.hidden_UH, dtype=head.dtype)
        for part, weight_wH, x_Uw, room_Uw in Products(tokens, head, kept, False):
            grad_x_Uw = grad_slice(upstream, tokens, head, part, x_Uw, room_Uw)
            if needs_hidden:
                add_product(grad_UH, grad_x_Uw, weight_wH)
            if needs_weight:
                write_product(grad_x_Uw.T, tokens.hidden_UH, grad_weight_VH[part])
            if needs_bias:
                grad_bias_V[part] = grad_x_Uw.sum(0)
        if not needs_hidden:
            return _gradient_of(hidden_RH, False), grad_weight_VH, grad_bias_V
        sum_over(given.group, grad_UH)
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


def _fake_gradients(given: LinearGradInputs) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = given.needs
    return (
        _gradient_of(given.hidden_RH, needs_hidden),
        _gradient_of(given.weight_VH, needs_weight),
        _gradient_of(given.bias_V, needs_bias),
    )


linear_logprobs_backward_op = Operator(
    "linear_logprobs_backward", LinearGradInputs, linear_backward, _fake_gradients
)
LEARNERS = ("hidden_RH", "weight_VH", "bias_V")  # the inputs that get a gradient


def head_gradients(
    saved: Saved, grad_logps_N: Tensor, grad_entropy_N: Tensor | None
) -> Mapping[str, Tensor]:
    """Of the policy's head, by name; no name where no gradient is asked for."""
    given = LinearGradInputs(
        grad_logps_N,
        grad_entropy_N,
        results=[saved.values[name] for name in RESULTS],
        needs=[saved.needs[name] for name in LEARNERS],
        **saved.those_of(LinearGradInputs),
    )
    grads = linear_logprobs_backward_op(given)
    return {name: grad for name, grad in zip(LEARNERS, grads, strict=True) if saved.needs[name]}


def _save(ctx: Any, given: LinearInputs, results: LinearResults) -> Mapping[str, Any]:
    _, entropy_N, *constants = results
    ctx.mark_non_differentiable(*constants, *([] if given.with_entropy else [entropy_N]))
    return {**given._asdict(), **dict(zip((*RESULTS, "kept"), results, strict=True))}


def _backward(saved: Saved) -> Mapping[str, Tensor]:
    grad_logps_N, grad_entropy_N, *_ = saved.grads
    with_entropy = saved.values["with_entropy"]
    return head_gradients(saved, grad_logps_N, grad_entropy_N if with_entropy else None)


linear_logprobs_op.differentiate(_save, _backward)
