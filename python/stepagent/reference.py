"""The slow, obvious definitions of everything fast: same names and signatures, plain autograd.

Inputs are cast to `dtype`, float64 unless told, and results stay in it. Imports nothing of the
package.

StepAgent: arXiv 2411.03817. DPO, for the log-ratio as a reward: arXiv 2305.18290. Generalised
advantage estimation: arXiv 1506.02438.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
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
    kept_NK: Index | None = None,
    return_entropy: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p_y = z_y − log Σ_j exp z_j with x = h · wᵀ + b and z = cap · tanh(x / cap) / T.

    j runs over the tokens that kept_NK[n] names, −1 names none; over all of them without it.
    """
    logits_NV = _head_logits(hidden_RH, weight_VH, rows_N, bias_V, softcap, dtype)
    if kept_NK is not None:
        kept_NV = (_index(kept_NK)[:, :, None] == torch.arange(logits_NV.shape[1])).any(1)
        logits_NV = logits_NV.masked_fill(~kept_NV, -torch.inf)
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


def info_nce(
    anchors_BH: Tensor,
    keys_VH: Tensor,
    positives_B: Tensor,
    *,
    temperature: float,
    candidates_BK: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """−1/B Σ_i log exp(z_i · z_p(i) / τ) / Σ_j exp(z_i · z_j / τ), j over the candidates of i."""
    anchors_BH, keys_VH = anchors_BH.to(dtype), keys_VH.to(dtype)
    losses = []
    for i, positive in enumerate(positives_B.tolist()):
        similar_V = keys_VH @ anchors_BH[i] / temperature
        allowed = range(len(keys_VH)) if candidates_BK is None else candidates_BK[i].tolist()
        kept = sorted({j for j in allowed if j >= 0})
        losses.append(torch.logsumexp(similar_V[kept], 0) - similar_V[positive])
    return torch.stack(losses).mean()


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

    Its exp is that of `_ratio`, which does not overflow.

    k3 estimates KL(π ‖ π_ref): http://joschu.net/blog/kl-approx.html.
    """
    index_N, ref_logits_NV = _index(labels_N), ref_logits_NV.detach()
    logps_N, _ = _logps_and_entropy(logits_NV, index_N, temperature, dtype)
    ref_logps_N, _ = _logps_and_entropy(ref_logits_NV, index_N, temperature, dtype)
    diff_N = logps_N - ref_logps_N
    return (diff_N, _ratio(-diff_N) - 1 + diff_N) if return_kl else diff_N


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


def step_pair_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    step_offsets: Index,
    expert_steps_P: Index,
    agent_steps_P: Index,
    *,
    beta: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The loss of the rewards of the two steps of each pair."""
    rewards_S = step_rewards(logps_N, ref_logps_N, step_offsets, beta=beta, dtype=dtype)
    expert_P, agent_P = rewards_S[_index(expert_steps_P)], rewards_S[_index(agent_steps_P)]
    return implicit_step_loss(expert_P, agent_P, dtype=dtype)


def implicit_step_loss(
    expert_rewards_P: Tensor, agent_rewards_P: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """loss_p = −log σ(r_E − r_A): DPO's loss, the expert's action against the agent's."""
    return -F.logsigmoid(expert_rewards_P.to(dtype) - agent_rewards_P.to(dtype))


def step_gae(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Index,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, return_t = A_t + V_t; constants."""
    rewards_S, values_S = rewards_S.detach().to(dtype), values_S.detach().to(dtype)
    advantages_S = torch.zeros_like(rewards_S)
    offsets = _index(trajectory_offsets).tolist()
    for b, (start, stop) in enumerate(itertools.pairwise(offsets)):
        advantage = torch.zeros((), dtype=dtype)
        next_value = advantage if bootstrap_values is None else bootstrap_values[b].to(dtype)
        for t in reversed(range(start, stop)):
            delta = rewards_S[t] + gamma * next_value - values_S[t]
            advantage = delta + gamma * lam * advantage
            advantages_S[t], next_value = advantage, values_S[t]
    return advantages_S, advantages_S + values_S


def discriminator_loss(
    expert_logits_P: Tensor,
    agent_logits_Q: Tensor,
    *,
    smoothing: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """−mean log D(agent) − mean log(1 − D(expert)), D = σ(logit); with smoothing of both labels."""
    x, y = agent_logits_Q.to(dtype), expert_logits_P.to(dtype)  # 1 − D = σ(−logit)
    agent = (1 - smoothing) * F.logsigmoid(x) + smoothing * F.logsigmoid(-x)
    expert = (1 - smoothing) * F.logsigmoid(-y) + smoothing * F.logsigmoid(y)
    return -agent.mean() - expert.mean()


def inverse_step_reward(
    agent_logits_S: Tensor, *, form: str = "agent", dtype: torch.dtype = torch.float64
) -> Tensor:
    """−log D, log(1 − D), or their sum."""
    x_S = agent_logits_S.to(dtype)  # D = σ(x), 1 − D = σ(−x)
    by_form = {"agent": -F.logsigmoid(x_S), "expert": F.logsigmoid(-x_S)}
    return by_form[form] if form in by_form else by_form["agent"] + by_form["expert"]


def outcome_loss(
    rewards_S: Tensor,
    trajectory_offsets: Index,
    successes_B: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The binary cross-entropy of σ(Σ r) with the outcome."""
    x_B = step_sums(rewards_S, trajectory_offsets, dtype=dtype)
    y_B = successes_B.to(dtype)
    return -(y_B * F.logsigmoid(x_B) + (1 - y_B) * F.logsigmoid(-x_B))


def ppo_loss(
    logps_N: Tensor,
    old_logps_N: Tensor,
    advantages_S: Tensor,
    step_offsets: Index,
    *,
    clip: float = 0.2,
    ratio: str = "step",
    ref_logps_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """−mean min(ρ A, clip(ρ) A) + kl_coef · mean KL, over steps or over tokens; ρ by `_ratio`."""
    logps_N, old_N = logps_N.to(dtype), old_logps_N.detach().to(dtype)
    terms: list[Tensor] = []
    kls: list[Tensor] = []
    offsets = _index(step_offsets).tolist()
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        tokens = [list(range(start, stop))]
        for unit in tokens if ratio == "step" else [[n] for n in tokens[0]]:
            rho = _ratio((logps_N[unit] - old_N[unit]).sum())
            A = advantages_S[s].detach().to(dtype)
            terms.append(torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A))
            if ref_logps_N is not None:
                d = logps_N[unit] - ref_logps_N[unit].detach().to(dtype)
                kls.append((d**2 / 2 if kl == "k2" else _ratio(-d) - 1 + d).sum())
    loss = -torch.stack(terms).mean()
    return loss + kl_coef * torch.stack(kls).mean() if kls else loss


def _ratio(x: Tensor) -> Tensor:
    """exp(x) up to 40; beyond, its tangent there: exp is infinite in float32 from 88.8 on, and
    infinity times the 0 of an advantage, or of a clipped gradient, would be NaN."""
    beyond = math.exp(40.0) * (1 + x - 40.0)
    return torch.where(x > 40.0, beyond, x.clamp(max=40.0).exp())


def leave_one_out(
    rewards_S: Tensor, groups_S: Index, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A_s = r_s − mean of the others of its group."""
    rewards, groups = rewards_S.detach().to(dtype).tolist(), _index(groups_S).tolist()
    others = [
        [rewards[j] for j in range(len(rewards)) if groups[j] == groups[s] and j != s]
        for s in range(len(rewards))
    ]
    return torch.tensor(
        [r - sum(o) / len(o) for r, o in zip(rewards, others, strict=True)], dtype=dtype
    )


def group_relative(
    rewards_S: Tensor,
    groups_S: Index,
    *,
    scale: bool = True,
    sizes_S: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A_s = (r_s − mean) / std of its group; 0 where the group's rewards are all the same.

    std is at least 1e-4 of the group's largest reward, as a deviation of rounding errors is none;
    sizes_S: the sizes of what the rewards were added from, where these may cancel.
    """
    rewards, groups = rewards_S.detach().to(dtype), _index(groups_S)
    sizes = rewards.abs() if sizes_S is None else sizes_S
    advantages = torch.zeros_like(rewards)
    for s in range(len(rewards)):
        group = rewards[groups == groups[s]]
        if group.min() == group.max():
            continue
        floor = 1e-4 * sizes[groups == groups[s]].max()
        advantages[s] = (rewards[s] - group.mean()) / (max(group.std(), floor) if scale else 1.0)
    return advantages


def gigpo(
    rewards_S: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    state_groups_S: Index,
    *,
    gamma: float = 0.95,
    omega: float = 1.0,
    scale: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A = A^E + ω A^S, of whole trajectories and of steps at equal states."""
    sums_B = step_sums(rewards_S, trajectory_offsets, dtype=dtype)
    rewards_S = rewards_S.detach().to(dtype)
    sizes_B = step_sums(rewards_S.abs(), trajectory_offsets, dtype=dtype)
    episode_B = group_relative(
        sums_B, trajectory_groups_B, scale=scale, sizes_S=sizes_B, dtype=dtype
    )
    returns_S = _discounted(rewards_S, trajectory_offsets, gamma)
    sizes_S = _discounted(rewards_S.abs(), trajectory_offsets, gamma)
    step_S = group_relative(returns_S, state_groups_S, scale=scale, sizes_S=sizes_S, dtype=dtype)
    return _spread(episode_B, trajectory_offsets) + omega * step_S


def istar(
    outcomes_B: Tensor,
    step_rewards_S: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    *,
    omega: float = 1.0,
    scale: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A = A^ep + ω A^st, step rewards compared over all steps of a task."""
    groups_B = _index(trajectory_groups_B)
    episode_B = group_relative(outcomes_B, groups_B, scale=scale, dtype=dtype)
    groups_S = _spread(groups_B, trajectory_offsets)
    step_S = group_relative(step_rewards_S, groups_S, scale=scale, dtype=dtype)
    return _spread(episode_B, trajectory_offsets) + omega * step_S


def prime(
    outcomes_B: Tensor,
    token_rewards_N: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    *,
    gamma: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Discounted rewards to go, less the others' mean reward, plus the outcome's advantage."""
    offsets, groups = _index(trajectory_offsets).tolist(), _index(trajectory_groups_B).tolist()
    rewards_N = token_rewards_N.detach().to(dtype).clone()
    means = [rewards_N[start:stop].mean() for start, stop in itertools.pairwise(offsets)]
    left_N = rewards_N.clone()
    for b, (start, stop) in enumerate(itertools.pairwise(offsets)):
        others = [means[j] for j in range(len(groups)) if groups[j] == groups[b] and j != b]
        left_N[start:stop] -= torch.stack(others).mean()
    outcome_B = leave_one_out(outcomes_B, trajectory_groups_B, dtype=dtype)
    return _discounted(left_N, trajectory_offsets, gamma) + _spread(outcome_B, trajectory_offsets)


def mt_grpo(
    turn_rewards_B: Tensor,
    outcomes_B: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    tool_steps_B: Index,
    *,
    lam: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A_O + λ A_T until the tool was called, A_O after."""
    outcome_B = group_relative(outcomes_B, trajectory_groups_B, dtype=dtype)
    turn_B = group_relative(turn_rewards_B, trajectory_groups_B, dtype=dtype)
    lengths, tools = _index(trajectory_offsets).diff().tolist(), _index(tool_steps_B).tolist()
    return torch.stack(
        [
            outcome_B[b] + (lam * turn_B[b] if t <= tools[b] else 0.0)
            for b, length in enumerate(lengths)
            for t in range(length)
        ]
    )


def _discounted(rewards_S: Tensor, trajectory_offsets: Index, gamma: float) -> Tensor:
    """R_t = Σ_{k ≥ t} γ^{k−t} r_k, each trajectory for itself."""
    returns_S = torch.zeros_like(rewards_S)
    for start, stop in itertools.pairwise(_index(trajectory_offsets).tolist()):
        for t in range(start, stop):
            returns_S[t] = sum(gamma ** (k - t) * rewards_S[k] for k in range(t, stop))
    return returns_S


def _spread(values_B: Tensor, trajectory_offsets: Index) -> Tensor:
    """Each trajectory's value for all of its steps."""
    return values_B.repeat_interleave(_index(trajectory_offsets).diff())


def _index(index: Index) -> Tensor:
    return torch.tensor(index).long() if isinstance(index, np.ndarray) else index.long()
