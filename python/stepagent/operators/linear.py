"""`linear_logprobs` as custom operators, in torch: log-probs from hidden rows and a head.

    x = h · wᵀ + b,    z = cap · tanh(x / cap) / T

Results are computed and returned in float32, for float64 inputs in float64; a gradient has the
dtype of its input. Left out: gradients of gradients, gradients to the temperature.

Dimensions: N scored tokens, R hidden rows, H hidden size, V vocabulary; n tokens with a valid
label, U distinct hidden rows among those, w vocabulary entries in a slice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepagent.checks import check_labels, check_rows, check_temperature
from stepagent.operators import blocks
from stepagent.operators.blocks import (
    Fold,
    Results,
    like_results,
    per_token,
    save,
    saved,
    scored,
    spread,
    upstream_of,
)


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
    tokens_n = scored(labels_N)
    rows_n = tokens_n if rows_N is None else rows_N[tokens_n]
    rows_U, group_n = torch.unique(rows_n, return_inverse=True)
    if len(rows_U) == len(rows_n):
        rows_U, group_n = rows_n, None
    # One slice of logits (n, width) or of upcast weights (width, H) fills the workspace at most.
    bytes_each = temperature.dtype.itemsize * max(len(tokens_n), hidden_RH.shape[1])
    width = min(
        max(blocks.MIN_SLICE, blocks.WORKSPACE_BYTES // max(bytes_each, 1)), weight_VH.shape[0]
    )
    return _Head(
        tokens_n,
        rows_U,
        group_n,
        hidden_RH[rows_U].to(temperature.dtype),
        weight_VH,
        bias_V,
        per_token(temperature, tokens_n),
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
        fold = Fold(labels_N[head.tokens_n], temperature.dtype, with_entropy)
        for start, stop in head.slices():
            capped_Uw = head.capped_Uw(head.weight_wH(start, stop), start)
            fold.update(head.scaled_nw(capped_Uw), start)
    return spread(fold.finish(), head.tokens_n, len(labels_N))


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
        upstream = upstream_of(head.tokens_n, labels_N, results, grad_logps_N, grad_entropy_N)
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
    return like_results(labels_N, temperature.dtype)


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
    save(ctx, tensors, output)


def _linear_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    results, tensors = saved(ctx)
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


linear_logprobs_op.register_autograd(_linear_autograd, setup_context=_linear_save)
