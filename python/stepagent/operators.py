"""The custom operators behind the ops, in torch: the portable path.

    x = h · wᵀ + b,    z = cap · tanh(x / cap) / T
    log p_y = z_y − log Σ_j exp z_j,    H = −Σ_j p_j log p_j

Logits live only in a bounded workspace: a slice of the vocabulary at a time for `linear_logprobs`,
a few rows at a time for `token_logprobs`. A fold keeps, of the logits other than the label's, the
maximum, Σ exp and Σ exp · z, in a fixed order. The label joins last, as
log p_y = −softplus(log Σ_{j≠y} exp z_j − z_y), which keeps its digits where p_y is close to 1.
The backward computes the logits again.

Results are computed and returned in float32, for float64 inputs in float64; a gradient has the
dtype of its input.

Left out: gradients of gradients, gradients to the temperature.

Dimensions: N scored tokens, R hidden rows, H hidden size, V vocabulary, S steps; n tokens with a
valid label, U distinct hidden rows among those, w vocabulary entries in a slice.
"""

import functools
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepagent.checks import (
    IGNORE,
    check_labels,
    check_offsets,
    check_rows,
    check_temperature,
)

WORKSPACE_BYTES = 64 * 2**20  # one block of logits, or of weights in the dtype of the computation
MIN_SLICE = 256  # vocabulary entries; narrower products waste the machine
FLOOR = -1e4  # exp(FLOOR) = 0 in float64 too, and unlike −inf it survives a product with 0

# logps_N, entropy_N (0 unless asked for), and for the backward max_N and log_sum_N: max_j z_j and
# log Σ_j exp(z_j − max). Their sum alone would lose the digits that a large maximum takes.
Results = tuple[Tensor, Tensor, Tensor, Tensor]


# ---------------------------------------------------- the maths of a block of logits


class _Fold:
    """Blocks of logits z, one after the other, into log-prob and entropy of the label.

    Keeps max, Σ exp(z − max) and Σ exp(z − max)(z − max) over every logit but the label's. The
    maximum starts from −inf, so that logits of any size work.
    """

    def __init__(self, labels_n: Tensor, dtype: torch.dtype, with_entropy: bool) -> None:
        self.labels_n = labels_n
        self.with_entropy = with_entropy
        self.max_n = torch.full_like(labels_n, -math.inf, dtype=dtype)
        self.sum_n = torch.zeros_like(self.max_n)
        self.moment_n = torch.zeros_like(self.max_n)
        self.label_n = torch.full_like(self.max_n, math.nan)  # stays NaN for a label no block holds

    def update(self, z_nw: Tensor, start: int) -> None:
        """Fold the logits of vocabulary entries start, start + 1, …; overwrites `z_nw`."""
        column_n1, inside_n1 = _label_column(self.labels_n, start, z_nw.shape[1])
        value_n1 = z_nw.gather(1, column_n1)
        self.label_n = torch.where(inside_n1, value_n1, self.label_n[:, None]).squeeze(1)
        z_nw.scatter_(1, column_n1, value_n1.masked_fill_(inside_n1, -math.inf))

        max_n = torch.maximum(self.max_n, z_nw.amax(1))
        shift_n = max_n.masked_fill(max_n == -math.inf, 0.0)  # −inf − (−inf) is NaN
        decay_n = (self.max_n - shift_n).clamp_(min=FLOOR)
        shrink_n = decay_n.exp()
        z_nw.sub_(shift_n[:, None]).clamp_(min=FLOOR)
        if self.with_entropy:
            exp_nw = z_nw.exp()
            kept_n = self.moment_n + decay_n * self.sum_n
            self.moment_n = shrink_n * kept_n + z_nw.mul_(exp_nw).sum(1)
        else:
            exp_nw = z_nw.exp_()
        self.sum_n = shrink_n * self.sum_n + exp_nw.sum(1)
        self.max_n = max_n

    def finish(self) -> Results:
        # With a label of +inf the limit log p = 0 would hide the overflow that made it.
        label_n = self.label_n.masked_fill(self.label_n == math.inf, math.nan)
        log_sum_others_n = self.sum_n.log()
        margin_n = label_n - self.max_n - log_sum_others_n
        logps_n = F.logsigmoid(margin_n)  # log σ(x) = −softplus(−x), without its threshold
        entropy_n = self._entropy(logps_n, margin_n, log_sum_others_n)
        max_n = torch.maximum(self.max_n, label_n)
        others_n = self.max_n - max_n + log_sum_others_n
        return logps_n, entropy_n, max_n, torch.logaddexp(others_n, label_n - max_n)

    def _entropy(self, logps_n: Tensor, margin_n: Tensor, log_sum_others_n: Tensor) -> Tensor:
        """H = −p log p − q log q + q H_others, with p the label's probability and q = 1 − p."""
        if not self.with_entropy:
            return torch.zeros_like(logps_n)
        p_n, q_n = logps_n.exp(), -torch.expm1(logps_n)
        entropy_others_n = log_sum_others_n - self.moment_n / self.sum_n
        label_term_n = (-p_n * logps_n).masked_fill(p_n == 0, 0.0)
        others_term_n = q_n * (entropy_others_n - F.logsigmoid(-margin_n))
        return label_term_n + others_term_n.masked_fill(q_n == 0, 0.0)


@dataclass(frozen=True)
class _Upstream:
    """What the backward of n tokens needs: results of the forward and their gradients."""

    labels_n: Tensor
    logps_n: Tensor
    entropy_n: Tensor
    max_n: Tensor
    log_sum_n: Tensor
    grad_logps_n: Tensor
    grad_entropy_n: Tensor | None

    def grad_logits_(self, z_nw: Tensor, start: int) -> Tensor:
        """∂/∂z_j = g (1[j = y] − p_j) − g_H p_j (log p_j + H), in place of `z_nw`.

        The label's column is −expm1(log p_y) g: near 1 a rounded p_y leaves 1 − p_y no digits.
        """
        column_n1, inside_n1 = _label_column(self.labels_n, start, z_nw.shape[1])
        z_nw.sub_(self.max_n[:, None]).sub_(self.log_sum_n[:, None])
        logp_nw = z_nw.clamp_(min=FLOOR)
        label_n = -torch.expm1(self.logps_n) * self.grad_logps_n
        if self.grad_entropy_n is None:
            grad_nw = logp_nw.exp_().mul_(-self.grad_logps_n[:, None])
        else:
            p_nw = logp_nw.exp()
            grad_nw = logp_nw.add_(self.entropy_n[:, None]).mul_(self.grad_entropy_n[:, None])
            grad_nw.add_(self.grad_logps_n[:, None]).mul_(p_nw).neg_()
            surprise_n = self.logps_n.clamp(min=FLOOR) + self.entropy_n
            label_n -= self.grad_entropy_n * self.logps_n.exp() * surprise_n
        value_n1 = torch.where(inside_n1, label_n[:, None], grad_nw.gather(1, column_n1))
        return grad_nw.scatter_(1, column_n1, value_n1)


def _label_column(labels_n: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each label in the block that begins at `start`, and whether it is in there."""
    local_n1 = (labels_n - start)[:, None]
    column_n1 = local_n1.clamp(0, width - 1)
    return column_n1, column_n1 == local_n1


def _scored(labels_N: Tensor) -> Tensor:
    """Positions of the labels that score. To count them stalls a CUDA stream."""
    return (labels_N != IGNORE).nonzero().squeeze(1)


def _per_token(temperature: Tensor, tokens_n: Tensor) -> Tensor:
    return temperature[tokens_n, None] if temperature.ndim else temperature


def _upstream(
    tokens_n: Tensor,
    labels_N: Tensor,
    results: list[Tensor],
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
) -> _Upstream:
    """What the backward needs, of these tokens."""
    logps_n, entropy_n, max_n, log_sum_n = (result_N[tokens_n] for result_N in results)
    return _Upstream(
        labels_N[tokens_n],
        logps_n,
        entropy_n,
        max_n,
        log_sum_n,
        grad_logps_N[tokens_n],
        None if grad_entropy_N is None else grad_entropy_N[tokens_n],
    )


def _like_results(labels_N: Tensor, dtype: torch.dtype) -> Results:
    """Their shapes, for the compiler."""
    a, b, c, d = (torch.empty_like(labels_N, dtype=dtype) for _ in range(4))
    return a, b, c, d


def _spread(results_n: Results, tokens_n: Tensor, N: int) -> Results:
    """Results of the scored tokens at their positions among all N, 0 elsewhere."""
    a, b, c, d = (r_n.new_zeros(N).index_copy_(0, tokens_n, r_n) for r_n in results_n)
    return a, b, c, d


# ------------------------------------------------------------ linear_logprobs


@dataclass(frozen=True)
class _Head:
    """The language-model head on the U distinct rows that n scored tokens share."""

    tokens_n: Tensor  # their positions among the N
    rows_U: Tensor  # positions of the rows among the R
    group_n: Tensor | None  # each token's row among the U; None where n = U, in order
    hidden_UH: Tensor  # in the dtype of the computation
    weight_VH: Tensor
    bias_V: Tensor | None
    temperature: Tensor  # () or (n, 1)
    softcap: float | None
    width: int  # vocabulary entries in a slice
    workspace: Tensor  # (U * width,)

    def slices(self) -> Iterator[tuple[int, int]]:
        V = self.weight_VH.shape[0]
        return ((start, min(start + self.width, V)) for start in range(0, V, self.width))

    def weight_wH(self, start: int, stop: int) -> Tensor:
        return self.weight_VH[start:stop].to(self.hidden_UH.dtype)

    def capped_Uw(self, weight_wH: Tensor, start: int) -> Tensor:
        """Logits of the rows before the temperature, in the workspace."""
        U, w = self.hidden_UH.shape[0], weight_wH.shape[0]
        x_Uw = self.workspace[: U * w].view(U, w)
        torch.mm(self.hidden_UH, weight_wH.T, out=x_Uw)
        if self.bias_V is not None:
            x_Uw += self.bias_V[start : start + w]
        if self.softcap is not None:
            x_Uw.div_(self.softcap).tanh_().mul_(self.softcap)
        return x_Uw

    def slope_Uw(self, capped_Uw: Tensor) -> Tensor | None:
        """Derivative of the softcap, 1 − tanh²."""
        return None if self.softcap is None else 1 - (capped_Uw / self.softcap).square_()

    def scaled_nw(self, capped_Uw: Tensor) -> Tensor:
        """Logits of the tokens; overwrites `capped_Uw` where no row is shared."""
        z_nw = capped_Uw if self.group_n is None else capped_Uw[self.group_n]
        return z_nw.div_(self.temperature)

    def grad_x_Uw(self, grad_z_nw: Tensor, slope_Uw: Tensor | None) -> Tensor:
        """Back through temperature, sharing and softcap; overwrites `grad_z_nw`."""
        grad_x_Uw = grad_z_nw.div_(self.temperature)
        if self.group_n is not None:
            # index_put_ adds in a fixed order; index_add_ on CUDA does not.
            zeros_Uw = grad_z_nw.new_zeros(self.hidden_UH.shape[0], grad_z_nw.shape[1])
            grad_x_Uw = zeros_Uw.index_put_((self.group_n,), grad_z_nw, accumulate=True)
        return grad_x_Uw if slope_Uw is None else grad_x_Uw.mul_(slope_Uw)


def compacted_head(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
) -> _Head:
    tokens_n = _scored(labels_N)
    rows_n = tokens_n if rows_N is None else rows_N[tokens_n]
    rows_U, group_n = torch.unique(rows_n, return_inverse=True)
    if len(rows_U) == len(rows_n):
        rows_U, group_n = rows_n, None
    # One slice of logits (n, width) or of upcast weights (width, H) fills the workspace at most.
    bytes_each = temperature.dtype.itemsize * max(len(tokens_n), hidden_RH.shape[1])
    width = min(max(MIN_SLICE, WORKSPACE_BYTES // max(bytes_each, 1)), weight_VH.shape[0])
    return _Head(
        tokens_n,
        rows_U,
        group_n,
        hidden_RH[rows_U].to(temperature.dtype),
        weight_VH,
        bias_V,
        _per_token(temperature, tokens_n),
        softcap,
        width,
        torch.empty(len(rows_U) * width, dtype=temperature.dtype, device=hidden_RH.device),
    )


def linear_forward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    with_entropy: bool,
) -> Results:
    check_labels(labels_N, weight_VH.shape[0])
    check_rows(rows_N, hidden_RH.shape[0])
    check_temperature(temperature)
    # A custom operator runs inside the caller's autocast, which would round these products.
    with torch.autocast(hidden_RH.device.type, enabled=False):
        head = compacted_head(hidden_RH, weight_VH, labels_N, rows_N, bias_V, temperature, softcap)
        fold = _Fold(labels_N[head.tokens_n], temperature.dtype, with_entropy)
        for start, stop in head.slices():
            capped_Uw = head.capped_Uw(head.weight_wH(start, stop), start)
            fold.update(head.scaled_nw(capped_Uw), start)
    return _spread(fold.finish(), head.tokens_n, len(labels_N))


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
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_RH, weight_VH and bias_V, in the order of `needs`."""
    needs_hidden, needs_weight, needs_bias = needs
    with torch.autocast(hidden_RH.device.type, enabled=False):
        head = compacted_head(hidden_RH, weight_VH, labels_N, rows_N, bias_V, temperature, softcap)
        upstream = _upstream(head.tokens_n, labels_N, results, grad_logps_N, grad_entropy_N)
        grad_hidden_UH = torch.zeros_like(head.hidden_UH)
        grad_weight_VH = _gradient_of(weight_VH, needs_weight)
        grad_bias_V = _gradient_of(bias_V, needs_bias)
        for start, stop in head.slices():
            weight_wH = head.weight_wH(start, stop)
            capped_Uw = head.capped_Uw(weight_wH, start)
            slope_Uw = head.slope_Uw(capped_Uw)
            grad_z_nw = upstream.grad_logits_(head.scaled_nw(capped_Uw), start)
            grad_x_Uw = head.grad_x_Uw(grad_z_nw, slope_Uw)
            if needs_hidden:
                grad_hidden_UH.addmm_(grad_x_Uw, weight_wH)
            if needs_weight:
                grad_weight_VH[start:stop] = grad_x_Uw.T @ head.hidden_UH
            if needs_bias:
                grad_bias_V[start:stop] = grad_x_Uw.sum(0)
    grad_hidden_RH = _gradient_of(hidden_RH, needs_hidden)
    if needs_hidden:
        grad_hidden_RH.zero_()[head.rows_U] = grad_hidden_UH.to(hidden_RH.dtype)
    return grad_hidden_RH, grad_weight_VH, grad_bias_V


def _gradient_of(tensor: Tensor | None, needed: bool) -> Tensor:
    """Room for a gradient, or no room where nobody needs it: an operator cannot return None."""
    return torch.empty_like(tensor) if tensor is not None and needed else torch.empty(0)


linear_logprobs_op = torch.library.custom_op(
    "stepagent::linear_logprobs", linear_forward, mutates_args=()
)
linear_logprobs_backward_op = torch.library.custom_op(
    "stepagent::linear_logprobs_backward", linear_backward, mutates_args=()
)


@linear_logprobs_op.register_fake
def _(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    with_entropy: bool,
) -> Results:
    return _like_results(labels_N, temperature.dtype)


@linear_logprobs_backward_op.register_fake
def _(
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
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = needs
    return (
        _gradient_of(hidden_RH, needs_hidden),
        _gradient_of(weight_VH, needs_weight),
        _gradient_of(bias_V, needs_bias),
    )


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.softcap, ctx.with_entropy = inputs
    _save(ctx, tensors, output)


def _linear_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    results, tensors = _saved(ctx)
    needs_hidden, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
    grad_hidden_RH, grad_weight_VH, grad_bias_V = linear_logprobs_backward_op(
        grads[0],
        grads[1] if ctx.with_entropy else None,
        results,
        *tensors,
        ctx.softcap,
        [needs_hidden, needs_weight, needs_bias],
    )
    return (
        grad_hidden_RH if needs_hidden else None,
        grad_weight_VH if needs_weight else None,
        None,
        None,
        grad_bias_V if needs_bias else None,
        None,
        None,
        None,
    )


def _save(ctx: Any, tensors: list[Tensor | None], results: Results) -> None:
    _, entropy_N, *others = results
    ctx.mark_non_differentiable(*others, *([] if ctx.with_entropy else [entropy_N]))
    ctx.save_for_backward(*results, *tensors)


def _saved(ctx: Any) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    return list(ctx.saved_tensors[:4]), ctx.saved_tensors[4:]


linear_logprobs_op.register_autograd(_linear_autograd, setup_context=_linear_save)


# ------------------------------------------------------------- token_logprobs


def _row_chunks(tokens_n: Tensor, V: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The scored rows, as many at a time as the workspace holds; at least one."""
    rows = max(WORKSPACE_BYTES // (dtype.itemsize * V), 1)
    return iter(torch.split(tokens_n, rows))


def _chunk_logits(logits_NV: Tensor, temperature: Tensor, chunk_n: Tensor) -> Tensor:
    """A copy of these rows, upcast before the temperature divides them."""
    return logits_NV[chunk_n].to(temperature.dtype).div_(_per_token(temperature, chunk_n))


def token_forward(
    logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, with_entropy: bool
) -> Results:
    N, V = logits_NV.shape
    check_labels(labels_N, V)
    check_temperature(temperature)
    zeros_N = temperature.new_zeros(N)
    results = (zeros_N, zeros_N.clone(), zeros_N.clone(), zeros_N.clone())
    for chunk_n in _row_chunks(_scored(labels_N), V, temperature.dtype):
        fold = _Fold(labels_N[chunk_n], temperature.dtype, with_entropy)
        fold.update(_chunk_logits(logits_NV, temperature, chunk_n), 0)
        for result_N, result_n in zip(results, fold.finish(), strict=True):
            result_N[chunk_n] = result_n
    return results


def token_backward(
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: list[Tensor],
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Gradient of logits_NV."""
    grad_logits_NV = torch.zeros_like(logits_NV)
    for chunk_n in _row_chunks(_scored(labels_N), logits_NV.shape[1], temperature.dtype):
        upstream = _upstream(chunk_n, labels_N, results, grad_logps_N, grad_entropy_N)
        grad_nV = upstream.grad_logits_(_chunk_logits(logits_NV, temperature, chunk_n), 0)
        grad_nV.div_(_per_token(temperature, chunk_n))
        grad_logits_NV[chunk_n] = grad_nV.to(logits_NV.dtype)
    return grad_logits_NV


token_logprobs_op = torch.library.custom_op(
    "stepagent::token_logprobs", token_forward, mutates_args=()
)
token_logprobs_backward_op = torch.library.custom_op(
    "stepagent::token_logprobs_backward", token_backward, mutates_args=()
)


@token_logprobs_op.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, with_entropy: bool) -> Results:
    return _like_results(labels_N, temperature.dtype)


@token_logprobs_backward_op.register_fake
def _(
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: list[Tensor],
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: Tensor,
) -> Tensor:
    return torch.empty_like(logits_NV)


@token_logprobs_op.register_kernel("cuda")
def token_forward_cuda(
    logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, with_entropy: bool
) -> Results:
    if not _suits_triton(temperature):
        return token_forward(logits_NV, labels_N, temperature, with_entropy)
    from stepagent.kernels.token_logprobs import token_logprobs as kernel  # loads triton: only here

    return kernel(logits_NV, labels_N, temperature, with_entropy=with_entropy)


@token_logprobs_backward_op.register_kernel("cuda")
def token_backward_cuda(
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: list[Tensor],
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: Tensor,
) -> Tensor:
    inputs = (grad_logps_N, grad_entropy_N, results, logits_NV, labels_N, temperature)
    if not _suits_triton(temperature):
        return token_backward(*inputs)
    from stepagent.kernels.token_logprobs import token_logprobs_backward as kernel

    return kernel(*inputs)


def _suits_triton(temperature: Tensor) -> bool:
    """The kernels compute in float32; the temperature has the dtype of the computation."""
    return temperature.dtype == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _token_save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.with_entropy = inputs
    _save(ctx, tensors, output)


def _token_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    results, tensors = _saved(ctx)
    grad_entropy_N = grads[1] if ctx.with_entropy else None
    grad_logits_NV = token_logprobs_backward_op(grads[0], grad_entropy_N, results, *tensors)
    return grad_logits_NV, None, None, None


token_logprobs_op.register_autograd(_token_autograd, setup_context=_token_save)


# --------------------------------------------------------------- logprob_diff


# diff_N, and of the policy logps_N, max_N and log_sum_N for the backward.
DiffResults = tuple[Tensor, Tensor, Tensor, Tensor]


def diff_forward(
    logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, temperature: Tensor
) -> DiffResults:
    logps_N, _, max_N, log_sum_N = token_forward(logits_NV, labels_N, temperature, False)
    ref_logps_N, *_ = token_forward(ref_logits_NV, labels_N, temperature, False)
    return logps_N - ref_logps_N, logps_N, max_N, log_sum_N


logprob_diff_op = torch.library.custom_op("stepagent::logprob_diff", diff_forward, mutates_args=())


@logprob_diff_op.register_fake
def _(
    logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, temperature: Tensor
) -> DiffResults:
    return _like_results(labels_N, temperature.dtype)


@logprob_diff_op.register_kernel("cuda")
def diff_forward_cuda(
    logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, temperature: Tensor
) -> DiffResults:
    inputs = (logits_NV, ref_logits_NV, labels_N, temperature)
    if not _suits_triton(temperature):
        return diff_forward(*inputs)
    from stepagent.kernels.logprob_diff import logprob_diff as kernel

    return kernel(*inputs)


def _diff_save(ctx: Any, inputs: tuple[Tensor, ...], output: DiffResults) -> None:
    logits_NV, _, labels_N, temperature = inputs
    _, *policy = output
    ctx.mark_non_differentiable(*policy)
    ctx.save_for_backward(*policy, logits_NV, labels_N, temperature)


def _diff_autograd(ctx: Any, grad_diff_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logps_N, max_N, log_sum_N, *tensors = ctx.saved_tensors
    # No gradient comes from an entropy, so its place among the results is not read.
    results = [logps_N, logps_N, max_N, log_sum_N]
    return token_logprobs_backward_op(grad_diff_N, None, results, *tensors), None, None, None


logprob_diff_op.register_autograd(_diff_autograd, setup_context=_diff_save)


# ------------------------------------------------------------------ step_sums


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
