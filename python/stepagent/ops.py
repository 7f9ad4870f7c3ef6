"""Log-probs of acted tokens, and their sums and rewards over steps: the public functions.

They check what they are given, then call the custom operators of ``operators/``. Dimensions: N
scored tokens, R hidden rows, H hidden size, V vocabulary, S steps.
"""

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stepagent.checks import (
    LABEL_CHECKS,
    Index,
    as_index,
    as_offsets,
    as_temperature,
    check_choice,
    check_floats,
    check_length,
    check_pair,
    check_positive,
    compute_dtype,
)
from stepagent.operators import paths
from stepagent.operators.head import UNASKED
from stepagent.operators.linear import linear_logprob_diff_op, linear_logprobs_op
from stepagent.operators.steps import step_pair_loss_op, step_rewards_op, step_sums_op
from stepagent.operators.tokens import logprob_diff_op, token_logprobs_op

LabelCheck: TypeAlias = Literal["sync", "device", "off"]


@overload
def linear_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Index,
    *,
    rows_N: Index | None = ...,
    bias_V: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    kept_NK: Index | None = ...,
    return_entropy: Literal[False] = ...,
    group: ProcessGroup | None = ...,
    keep_bytes: int | None = ...,
    check_labels: LabelCheck = ...,
    batch_invariant: bool = ...,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    labels_N: Index,
    *,
    rows_N: Index | None = ...,
    bias_V: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    kept_NK: Index | None = ...,
    return_entropy: Literal[True],
    group: ProcessGroup | None = ...,
    keep_bytes: int | None = ...,
    check_labels: LabelCheck = ...,
    batch_invariant: bool = ...,
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
    """
    hidden_RH, weight_VH, bias_V = _head("", hidden_RH, weight_VH, bias_V)
    labels_N, rows_N = _labelled_rows("", hidden_RH, labels_N, rows_N)
    if kept_NK is not None:
        kept_NK = as_index("kept_NK", kept_NK, hidden_RH.device, ndim=2)
        check_length("kept_NK", kept_NK, labels_N.shape[0], "labels_N")
    if softcap is not None:
        check_positive("softcap", softcap)
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    keep = _kept(hidden_RH, weight_VH, bias_V, return_entropy, keep_bytes)
    if batch_invariant:
        _check_batch_invariance(hidden_RH, group, kept_NK)
        keep = ("nothing", 0)
    logps_N, entropy_N, *_ = linear_logprobs_op(
        hidden_RH,
        weight_VH,
        labels_N,
        rows_N,
        bias_V,
        as_temperature(temperature, labels_N, compute_dtype(hidden_RH)),
        softcap,
        return_entropy,
        *keep,
        "" if group is None else group.group_name,
        check_labels,
        batch_invariant,
        kept_NK,
    )
    return (logps_N, entropy_N) if return_entropy else logps_N


@overload
def linear_logprob_diff(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    labels_N: Index,
    *,
    rows_N: Index | None = ...,
    ref_rows_N: Index | None = ...,
    bias_V: Tensor | None = ...,
    ref_bias_V: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    return_kl: Literal[False] = ...,
    group: ProcessGroup | None = ...,
    keep_bytes: int | None = ...,
    check_labels: LabelCheck = ...,
) -> Tensor: ...
@overload
def linear_logprob_diff(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    labels_N: Index,
    *,
    rows_N: Index | None = ...,
    ref_rows_N: Index | None = ...,
    bias_V: Tensor | None = ...,
    ref_bias_V: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    return_kl: Literal[True],
    group: ProcessGroup | None = ...,
    keep_bytes: int | None = ...,
    check_labels: LabelCheck = ...,
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
        TypeError, ValueError: as `linear_logprobs`.
    """
    hidden_RH, weight_VH, bias_V = _head("", hidden_RH, weight_VH, bias_V)
    ref_bias_V = None if ref_bias_V is None else ref_bias_V.detach()
    ref_hidden_RH, ref_weight_VH, ref_bias_V = _head(
        "ref_", ref_hidden_RH.detach(), ref_weight_VH.detach(), ref_bias_V
    )
    labels_N, rows_N = _labelled_rows("", hidden_RH, labels_N, rows_N)
    _, ref_rows_N = _labelled_rows("ref_", ref_hidden_RH, labels_N, ref_rows_N)
    check_floats(("hidden_RH", hidden_RH, 2), ("ref_hidden_RH", ref_hidden_RH, 2))
    if ref_weight_VH.shape[0] != weight_VH.shape[0]:
        sizes = f"{weight_VH.shape[0]} and {ref_weight_VH.shape[0]}"
        raise ValueError(f"weight_VH and ref_weight_VH must share one vocabulary, got V = {sizes}")
    if softcap is not None:
        check_positive("softcap", softcap)
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    diff_N, *_ = linear_logprob_diff_op(
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
        *_kept(hidden_RH, weight_VH, bias_V, False, keep_bytes),
        "" if group is None else group.group_name,
        check_labels,
    )
    return (diff_N, _k3(diff_N)) if return_kl else diff_N


def _head(
    prefix: str, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden rows, weights and bias that fit each other, as autocast gives them to a product."""
    hidden_RH, weight_VH, bias_V = map(_autocast, (hidden_RH, weight_VH, bias_V))
    floats = [(f"{prefix}hidden_RH", hidden_RH, 2), (f"{prefix}weight_VH", weight_VH, 2)]
    check_floats(*floats, *([] if bias_V is None else [(f"{prefix}bias_V", bias_V, 1)]))
    V = weight_VH.shape[0]
    if weight_VH.shape[1] != hidden_RH.shape[1] or V == 0:
        raise ValueError(
            f"{prefix}weight_VH must be (V, {hidden_RH.shape[1]}) with V >= 1 to match "
            f"{prefix}hidden_RH, got {tuple(weight_VH.shape)}"
        )
    if bias_V is not None and bias_V.shape[0] != V:
        raise ValueError(f"{prefix}bias_V must be ({V},), got {tuple(bias_V.shape)}")
    return hidden_RH, weight_VH, bias_V


def _autocast(tensor: Any) -> Any:
    """Cast where autocast would: float32 and halves of a device for which it is on."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _labelled_rows(
    prefix: str, hidden_RH: Tensor, labels_N: Index, rows_N: Index | None
) -> tuple[Tensor, Tensor | None]:
    labels_N = as_index("labels_N", labels_N, hidden_RH.device)
    rows, hidden = f"{prefix}rows_N", f"{prefix}hidden_RH"
    if rows_N is None:
        check_length(
            "labels_N", labels_N, hidden_RH.shape[0], f"the rows of {hidden}, as {rows} is None"
        )
        return labels_N, None
    rows_N = as_index(rows, rows_N, hidden_RH.device)
    check_length(rows, rows_N, labels_N.shape[0], "labels_N")
    return labels_N, rows_N


def _check_batch_invariance(
    hidden_RH: Tensor, group: ProcessGroup | None, kept_NK: Tensor | None
) -> None:
    if not paths.runs_triton(hidden_RH):
        raise ValueError(
            "batch_invariant needs Triton's kernel, which takes float32 and halves on a GPU (a "
            "math library rounds a row by the rows beside it); hidden_RH is "
            f"{hidden_RH.dtype} on {hidden_RH.device}"
        )
    if group is not None:
        raise ValueError("batch_invariant does not go with a group: its kernel knows no shards")
    if kept_NK is not None:
        raise ValueError("batch_invariant does not go with kept_NK: its kernel knows no sets")


def _kept(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    entropy: bool,
    keep_bytes: int | None,
) -> tuple[str, int]:
    """What the forward keeps for the backward, as ``operators/linear.py`` knows it."""
    if keep_bytes is None:
        keep_bytes = UNASKED if hidden_RH.is_cuda else 0
    elif keep_bytes < 0:
        raise ValueError(f"keep_bytes must be >= 0, got {keep_bytes}")
    head_learns = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if not torch.is_grad_enabled() or not (head_learns or hidden_RH.requires_grad):
        return "nothing", 0
    if not head_learns and not entropy:
        return "gradient", 0
    return ("logits", keep_bytes) if keep_bytes else ("nothing", 0)


@overload
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
    check_labels: LabelCheck = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
    check_labels: LabelCheck = ...,
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
        TypeError, ValueError: as `linear_logprobs`.
    """
    check_floats(("logits_NV", logits_NV, 2))
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    labels_N = _labels_of(logits_NV, labels_N)
    temperature = as_temperature(temperature, labels_N, compute_dtype(logits_NV))
    logps_N, entropy_N, *_ = token_logprobs_op(
        logits_NV, labels_N, temperature, return_entropy, check_labels
    )
    return (logps_N, entropy_N) if return_entropy else logps_N


@overload
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_kl: Literal[False] = ...,
    check_labels: LabelCheck = ...,
) -> Tensor: ...
@overload
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_kl: Literal[True],
    check_labels: LabelCheck = ...,
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
            labels sampled from π; its gradient flows too.
        check_labels: as in `linear_logprobs`.

    Returns:
        diff_N, or (diff_N, kl_N), in nats; float32, float64 where one of the logits is float64.

    Raises:
        TypeError, ValueError: as `token_logprobs`; ValueError when the two shapes differ.
    """
    check_floats(("logits_NV", logits_NV, 2))
    check_floats(("ref_logits_NV", ref_logits_NV, 2))
    check_pair("logits_NV", logits_NV, "ref_logits_NV", ref_logits_NV)
    check_choice("check_labels", check_labels, LABEL_CHECKS)
    labels_N = _labels_of(logits_NV, labels_N)
    dtype = torch.promote_types(compute_dtype(logits_NV), compute_dtype(ref_logits_NV))
    temperature = as_temperature(temperature, labels_N, dtype)
    diff_N, *_ = logprob_diff_op(
        logits_NV, ref_logits_NV.detach(), labels_N, temperature, check_labels
    )
    return (diff_N, _k3(diff_N)) if return_kl else diff_N


def _k3(diff_N: Tensor) -> Tensor:
    """exp(−d) − 1 + d, in float64: near 0 it is d² / 2, the difference of terms as large as d."""
    d_N = diff_N.double()
    return (torch.expm1(-d_N) + d_N).to(diff_N.dtype)


def _labels_of(logits_NV: Tensor, labels_N: Index) -> Tensor:
    """The labels as int64, one for each row of logits."""
    labels_N = as_index("labels_N", labels_N, logits_NV.device)
    if logits_NV.shape[1] == 0:
        raise ValueError(f"logits_NV must have V >= 1, got {tuple(logits_NV.shape)}")
    check_length("labels_N", labels_N, logits_NV.shape[0], "the rows of logits_NV")
    return labels_N


def step_sums(values_N: Tensor, step_offsets: Index) -> Tensor:
    """sums[s] = Σ values[step_offsets[s] : step_offsets[s + 1]], in float64 and a fixed order.

    Args:
        values_N: (N,), any float dtype.
        step_offsets: (S + 1,) int32 or int64, ascending from 0 to N; an empty step sums to 0.

    Returns:
        sums_S; float32, float64 for float64 values.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: another shape or device, or offsets that do not ascend from 0 to N (unchecked on
            CUDA, where looking at them would stall the stream).
    """
    check_floats(("values_N", values_N, 1))
    step_offsets = as_offsets("step_offsets", step_offsets, values_N.device)
    sums_S: Tensor = step_sums_op(values_N, step_offsets)
    return sums_S


def step_rewards(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Index, *, beta: float
) -> Tensor:
    """Implicit reward of each step: r_s = β Σ_{n in s} (log π(y_n) − log π_ref(y_n)).

    DPO's reward (arXiv 2305.18290) of the step's action; subtracted and added in float64, in a
    fixed order.

    Args:
        logps_N, ref_logps_N: (N,) in nats, any float dtypes; the gradient goes to `logps_N` only.
        step_offsets: as `step_sums`.
        beta: β > 0, finite.

    Returns:
        rewards_S; float32, float64 where one of the log-probs is float64.

    Raises:
        TypeError, ValueError: as `step_sums`; ValueError for another beta or two different shapes.
    """
    rewards_S: Tensor = step_rewards_op(
        *_scored_steps(logps_N, ref_logps_N, step_offsets, beta), float(beta)
    )
    return rewards_S


def step_pair_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Index,
    expert_steps_P: Index,
    agent_steps_P: Index,
    *,
    beta: float,
) -> Tensor:
    """Prefer the expert's action at each step, from the log-probs: loss_p = −log σ(r_E − r_A).

    `implicit_step_loss` of the two steps' `step_rewards` (arXiv 2411.03817) as one operator. The
    difference is taken in float64, so rewards that are large and close keep its digits.

    Args:
        logps_N, ref_logps_N, step_offsets, beta: as `step_rewards`.
        expert_steps_P, agent_steps_P: (P,) int32 or int64 in [0, S): the two steps of each pair. A
            step may be in many pairs, or in none.

    Returns:
        loss_P in nats; float32, float64 where one of the log-probs is float64. The gradient is
        added in float64 and a fixed order: the same inputs give the same bits.

    Raises:
        TypeError, ValueError: as `step_rewards`; ValueError for two numbers of steps, or a step
            outside [0, S) (unchecked on CUDA, as the offsets).
    """
    inputs = _scored_steps(logps_N, ref_logps_N, step_offsets, beta)
    expert_steps_P = as_index("expert_steps_P", expert_steps_P, logps_N.device)
    agent_steps_P = as_index("agent_steps_P", agent_steps_P, logps_N.device)
    check_length("agent_steps_P", agent_steps_P, expert_steps_P.shape[0], "expert_steps_P")
    loss_P: Tensor
    loss_P, _ = step_pair_loss_op(*inputs, expert_steps_P, agent_steps_P, float(beta))
    return loss_P


def _scored_steps(
    logps_N: Tensor, ref_logps_N: Tensor, step_offsets: Index, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the rewards of steps are made of, checked; the reference a constant."""
    check_floats(("logps_N", logps_N, 1))
    check_floats(("ref_logps_N", ref_logps_N, 1))
    check_pair("logps_N", logps_N, "ref_logps_N", ref_logps_N)
    check_positive("beta", beta)
    return logps_N, ref_logps_N.detach(), as_offsets("step_offsets", step_offsets, logps_N.device)
