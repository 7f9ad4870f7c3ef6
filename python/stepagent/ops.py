"""Log-probs of acted tokens, and their sums and rewards over steps: the public functions.

They check what they are given, then call the custom operators of ``operators/``. Dimensions: N
scored tokens, R hidden rows, H hidden size, V vocabulary, S steps.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from stepagent.checks import (
    Index,
    as_index,
    as_offsets,
    as_temperature,
    check_floats,
    check_length,
    check_pair,
    check_positive,
    compute_dtype,
)
from stepagent.operators.linear import linear_logprobs_op
from stepagent.operators.steps import step_pair_loss_op, step_rewards_op, step_sums_op
from stepagent.operators.tokens import logprob_diff_op, token_logprobs_op


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
    return_entropy: Literal[False] = ...,
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
    return_entropy: Literal[True],
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
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under a language-model head, without the N×V logits.

        x = h · wᵀ + b,    z = cap · tanh(x / cap) / T,    log p_y = z_y − log Σ_j exp z_j

    Only rows that a valid label names go through the head, each of them once.

    Args:
        hidden_RH: (R, H), any float dtype.
        weight_VH: (V, H), dtype of `hidden_RH`.
        labels_N: (N,) int32 or int64 in [0, V), or -100: log-prob 0, entropy 0, no gradient.
        rows_N: (N,) int32 or int64 in [0, R): `hidden_RH[rows_N[n]]` predicts label n; rows may
            repeat. By default N = R and row n predicts label n.
        bias_V: (V,), dtype of `hidden_RH`.
        temperature: T > 0, one for all or a float tensor (N,) on the same device; a constant.
        softcap: cap > 0, or None for z = x / T.
        return_entropy: also return the entropy of each predicted distribution.

    Returns:
        logps_N, or (logps_N, entropy_N), in nats; float32, for float64 inputs float64.
        Differentiable in `hidden_RH`, `weight_VH` and `bias_V`.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: a shape, device, label, row, temperature or softcap that breaks these rules. On
            CUDA, where looking at values would stall the stream, a label outside [0, V) scores NaN
            instead and the values of a temperature tensor are not checked.
    """
    floats = [("hidden_RH", hidden_RH, 2), ("weight_VH", weight_VH, 2)]
    check_floats(*floats, *([] if bias_V is None else [("bias_V", bias_V, 1)]))
    labels_N = as_index("labels_N", labels_N, hidden_RH.device)
    V = weight_VH.shape[0]
    if weight_VH.shape[1] != hidden_RH.shape[1] or V == 0:
        raise ValueError(
            f"weight_VH must be (V, {hidden_RH.shape[1]}) with V >= 1 to match hidden_RH, "
            f"got {tuple(weight_VH.shape)}"
        )
    if bias_V is not None and bias_V.shape[0] != V:
        raise ValueError(f"bias_V must be ({V},), got {tuple(bias_V.shape)}")
    if rows_N is None:
        check_length(
            "labels_N", labels_N, hidden_RH.shape[0], "the rows of hidden_RH, as rows_N is None"
        )
    else:
        rows_N = as_index("rows_N", rows_N, hidden_RH.device)
        check_length("rows_N", rows_N, labels_N.shape[0], "labels_N")
    if softcap is not None:
        check_positive("softcap", softcap)
    temperature = as_temperature(temperature, labels_N, compute_dtype(hidden_RH))
    logps_N, entropy_N, *_ = linear_logprobs_op(
        hidden_RH, weight_VH, labels_N, rows_N, bias_V, temperature, softcap, return_entropy
    )
    return (logps_N, entropy_N) if return_entropy else logps_N


@overload
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under given logits.

        z = logits / T,    log p_y = z_y − log Σ_j exp z_j

    Args:
        logits_NV: (N, V), any float dtype and strides; −inf forbids a token, NaN and +inf give NaN.
        labels_N: (N,) int32 or int64 in [0, V), or -100: log-prob 0, entropy 0, no gradient.
        temperature: T > 0, one for all or a float tensor (N,) on the same device; a constant.
        return_entropy: also return the entropy of each distribution.

    Returns:
        logps_N, or (logps_N, entropy_N), in nats; float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError: as `linear_logprobs`.
    """
    check_floats(("logits_NV", logits_NV, 2))
    labels_N = _labels_of(logits_NV, labels_N)
    temperature = as_temperature(temperature, labels_N, compute_dtype(logits_NV))
    logps_N, entropy_N, *_ = token_logprobs_op(logits_NV, labels_N, temperature, return_entropy)
    return (logps_N, entropy_N) if return_entropy else logps_N


@overload
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_kl: Literal[False] = ...,
) -> Tensor: ...
@overload
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = ...,
    return_kl: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = 1.0,
    return_kl: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log π(y) − log π_ref(y) of each label; the gradient goes to `logits_NV` only.

    Args:
        logits_NV, ref_logits_NV: (N, V), any float dtypes and strides.
        labels_N, temperature: as `token_logprobs`; temperature applies to both. Label -100 gives 0.
        return_kl: also return exp(−diff) − 1 + diff >= 0, the k3 estimate of KL(π ‖ π_ref) for
            labels sampled from π; its gradient flows too.

    Returns:
        diff_N, or (diff_N, kl_N), in nats; float32, float64 where one of the logits is float64.

    Raises:
        TypeError, ValueError: as `token_logprobs`; ValueError when the two shapes differ.
    """
    check_floats(("logits_NV", logits_NV, 2))
    check_floats(("ref_logits_NV", ref_logits_NV, 2))
    check_pair("logits_NV", logits_NV, "ref_logits_NV", ref_logits_NV)
    labels_N = _labels_of(logits_NV, labels_N)
    dtype = torch.promote_types(compute_dtype(logits_NV), compute_dtype(ref_logits_NV))
    temperature = as_temperature(temperature, labels_N, dtype)
    diff_N, *_ = logprob_diff_op(logits_NV, ref_logits_NV.detach(), labels_N, temperature)
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
