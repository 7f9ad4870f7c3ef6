"""The slow, obvious definitions of everything fast: same names and signatures, plain autograd.

Inputs are cast to `dtype`, float64 unless told, and results stay in it. Imports nothing of the
package.

StepAgent: arXiv 2411.03817. DPO, for the log-ratio as a reward: arXiv 2305.18290.
"""

import numpy as np
import torch
from torch import Tensor

Index = Tensor | np.ndarray


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
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p_y = z_y − log Σ_j exp z_j with x = h · wᵀ + b and z = cap · tanh(x / cap) / T."""
    logits_NV = _head_logits(hidden_RH, weight_VH, rows_N, bias_V, softcap, dtype)
    return token_logprobs(
        logits_NV, labels_N, temperature=temperature, return_entropy=return_entropy, dtype=dtype
    )


def _head_logits(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    rows_N: Index | None,
    bias_V: Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    hidden_NH = hidden_RH if rows_N is None else hidden_RH[_index(rows_N)]
    logits_NV = hidden_NH.to(dtype) @ weight_VH.to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def token_logprobs(
    logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p = log_softmax(logits / T), H = −Σ_j p_j log p_j; both 0 where the label is −100."""
    logps_N, entropy_N = _logps_and_entropy(logits_NV, _index(labels_N), temperature, dtype)
    return (logps_N, entropy_N) if return_entropy else logps_N


def _logps_and_entropy(
    logits_NV: Tensor, labels_N: Tensor, temperature: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scored = labels_N != -100
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).expand(labels_N.shape)[scored, None]
    logp_nV = torch.log_softmax(logits_NV.to(dtype)[scored] / temperature, dim=-1)
    logps_n = logp_nV.gather(1, labels_N[scored, None]).squeeze(1)
    p_nV = logp_nV.exp()
    entropy_n = -(p_nV * logp_nV.masked_fill(p_nV == 0, 0.0)).sum(-1)  # 0 log 0 = 0
    zeros_N = torch.zeros(labels_N.shape, dtype=dtype)
    return zeros_N.index_put((scored,), logps_n), zeros_N.index_put((scored,), entropy_n)


def logprob_diff(
    logits_NV: Tensor,
    ref_logits_NV: Tensor,
    labels_N: Index,
    *,
    temperature: float | Tensor = 1.0,
    return_kl: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """d = log π(y) − log π_ref(y), the log-ratio of DPO, π_ref a constant; k3 = exp(−d) − 1 + d.

    k3 estimates KL(π ‖ π_ref): http://joschu.net/blog/kl-approx.html.
    """
    index_N, ref_logits_NV = _index(labels_N), ref_logits_NV.detach()
    logps_N, _ = _logps_and_entropy(logits_NV, index_N, temperature, dtype)
    ref_logps_N, _ = _logps_and_entropy(ref_logits_NV, index_N, temperature, dtype)
    diff_N = logps_N - ref_logps_N
    return (diff_N, torch.exp(-diff_N) - 1 + diff_N) if return_kl else diff_N


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
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """`logprob_diff` of the logits of two heads, the reference's a constant."""
    logits_NV = _head_logits(hidden_RH, weight_VH, rows_N, bias_V, softcap, dtype)
    ref_logits_NV = _head_logits(
        ref_hidden_RH, ref_weight_VH, ref_rows_N, ref_bias_V, softcap, dtype
    )
    return logprob_diff(
        logits_NV,
        ref_logits_NV,
        labels_N,
        temperature=temperature,
        return_kl=return_kl,
        dtype=dtype,
    )


def step_sums(
    values_N: Tensor, step_offsets: Index, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """sums[s] = Σ values[step_offsets[s] : step_offsets[s + 1]]."""
    lengths = _index(step_offsets).diff().tolist()
    steps = torch.split(values_N.to(dtype), lengths)
    return torch.stack([step.sum() for step in steps]) if steps else values_N.to(dtype)[:0]


def step_rewards(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Index,
    *,
    beta: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """r_s = β Σ_{n in s} (log π(y_n) − log π_ref(y_n)): DPO's reward, per step."""
    diff_N = logps_N.to(dtype) - ref_logps_N.detach().to(dtype)
    return beta * step_sums(diff_N, step_offsets, dtype=dtype)


def implicit_step_loss(
    expert_rewards_P: Tensor, agent_rewards_P: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """loss_p = −log σ(r_E − r_A): DPO's loss, the expert's action against the agent's."""
    return -torch.log(torch.sigmoid(expert_rewards_P.to(dtype) - agent_rewards_P.to(dtype)))


def _index(index: Index) -> Tensor:
    return torch.tensor(index).long() if isinstance(index, np.ndarray) else index.long()
