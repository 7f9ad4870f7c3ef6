"""Objectives and rewards: pure functions of tensors.

P pairs of one expert action and one agent action at the same state; S steps, of which each is one
action; N tokens of these actions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stepagent.checks import (
    Index,
    as_offsets,
    check_choice,
    check_finite,
    check_floats,
    check_length,
    check_nonnegative,
    check_pair,
    check_positive,
    compute_dtype,
)
from stepagent.learning.options.choices import (
    KL_ESTIMATORS,
    RATIOS,
    REWARD_FORMS,
    KLEstimator,
    Ratio,
    RewardForm,
)
from stepagent.ops import step_rewards, step_sums
from stepagent.ops.kl import k3, ratios_of


def implicit_step_loss(expert_rewards_P: Tensor, agent_rewards_P: Tensor) -> Tensor:
    """Prefer the expert's action at each step: loss_p = −log σ(r_E − r_A) (arXiv 2411.03817).

    Args:
        expert_rewards_P, agent_rewards_P: (P,) implicit rewards of the two actions, as from
            `step_rewards`, the same float dtype.

    Returns:
        loss_P in nats, in the dtype of the rewards; exact for differences of any size.

    Raises:
        TypeError: rewards that are not float tensors of one dtype.
        ValueError: two shapes, or a shape that is not (P,).
    """
    pair = [("expert_rewards_P", expert_rewards_P), ("agent_rewards_P", agent_rewards_P)]
    check_floats(*((name, rewards_P, 1) for name, rewards_P in pair))
    check_pair(*pair[0], *pair[1])
    return -F.logsigmoid(expert_rewards_P - agent_rewards_P)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) for any x; torch's own is x from 20 on, which float64 can tell."""
    return -F.logsigmoid(-x)


def discriminator_loss(
    expert_logits_P: Tensor, agent_logits_Q: Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """Tell the agent's actions from the expert's (arXiv 2411.03817; GAIL, arXiv 1606.03476).

    The logits are those of D = σ(logit) = P(agent | s, a):

        L = −mean log D(agent) − mean log(1 − D(expert))

    With smoothing ε each action also counts as the other's, by a share of ε: the best logit of an
    action that only one of them takes is then ±log((1 − ε) / ε), not infinity.

    Args:
        expert_logits_P, agent_logits_Q: (P,) and (Q,), one float dtype; P and Q may differ.
        smoothing: ε in [0, ½).

    Returns:
        L, a scalar in the dtype of the logits; 2 log 2 where D = ½ everywhere.

    Raises:
        TypeError: logits that are not float tensors of one dtype.
        ValueError: another shape, no action on one side, a logit that is not finite (not looked
            for on CUDA), or a smoothing outside [0, ½).
    """
    sides = [("expert_logits_P", expert_logits_P), ("agent_logits_Q", agent_logits_Q)]
    check_floats(*((name, logits, 1) for name, logits in sides))
    for name, logits in sides:
        if not len(logits):
            raise ValueError(
                f"{name} must not be empty, as a discriminator needs actions of both sides"
            )
        check_finite(name, logits)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing must be in [0, 0.5), got {smoothing}")
    # −(1 − ε) log σ(x) − ε log σ(−x) = softplus(−x) + ε x
    agent = (_softplus(-agent_logits_Q) + smoothing * agent_logits_Q).mean()
    expert = (_softplus(expert_logits_P) - smoothing * expert_logits_P).mean()
    return agent + expert


def inverse_step_reward(agent_logits_S: Tensor, *, form: RewardForm = "agent") -> Tensor:
    """The reward of an action that a discriminator takes for the expert's (arXiv 2411.03817).

    ``agent``: r = −log D ≥ 0, the paper's. ``expert``: r = log(1 − D) ≤ 0, the opposite labelling
    of GAIL. ``difference``: r = log((1 − D) / D), their sum (AIRL, arXiv 1710.11248), which is
    log π_E − log π for the best discriminator. All rise as D falls, so all rank actions alike; the
    first rewards long episodes and the second short ones.

    Args:
        agent_logits_S: (S,) logits of D = P(agent | s, a), any float dtype. Those of a
            discriminator that was trained as P(expert | s, a) are its negated ones.

    Returns:
        rewards_S in the dtype of the logits, without overflow for logits of any size.

    Raises:
        TypeError: logits that are not a float tensor.
        ValueError: another shape or form, or a logit that is not finite (not looked for on CUDA).
    """
    check_floats(("agent_logits_S", agent_logits_S, 1))
    check_choice("form", form, REWARD_FORMS)
    check_finite("agent_logits_S", agent_logits_S)
    if form == "agent":
        return _softplus(-agent_logits_S)
    return -_softplus(agent_logits_S) if form == "expert" else -agent_logits_S


def outcome_loss(rewards_S: Tensor, trajectory_offsets: Index, successes_B: Tensor) -> Tensor:
    """Learn step rewards from outcomes alone (PRIME, arXiv 2502.01456).

        loss_b = −y_b log σ(R_b) − (1 − y_b) log(1 − σ(R_b)),  R_b = Σ r over trajectory b

    with r = β (log π_φ − log π_ref), as `step_rewards` gives them.

    Args:
        rewards_S: (S,) of the steps (or tokens) of B trajectories, any float dtype.
        trajectory_offsets: (B + 1,) int32 or int64, ascending from 0 to S.
        successes_B: (B,) y, a bool, or floats in [0, 1].

    Returns:
        loss_B in nats: float32, float64 for float64 rewards.

    Raises:
        TypeError, ValueError: another dtype, shape or device, or offsets as in `step_sums`.
    """
    sums_B = step_sums(rewards_S, trajectory_offsets)
    check_pair("successes_B", successes_B, "the trajectories", sums_B)
    y_B = successes_B.to(sums_B.dtype)
    # Not torch's own, whose max(x, 0) − x y + log(1 + e^−|x|) cancels where the loss is small.
    return -(y_B * F.logsigmoid(sums_B) + (1 - y_B) * F.logsigmoid(-sums_B))


def ppo_loss(
    logps_N: Tensor,
    old_logps_N: Tensor,
    advantages_S: Tensor,
    step_offsets: Index,
    *,
    clip: float = 0.2,
    ratio: Ratio = "step",
    ref_logps_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KLEstimator = "k3",
) -> Tensor:
    """PPO's clipped objective (arXiv 1707.06347) with an action of the agent as one decision.

        L = −mean_s min(ρ_s A_s, clip(ρ_s, 1 − ε, 1 + ε) A_s) + kl_coef · mean_s Σ_{n in s} k_n

    ρ_s = exp Σ_{n in s} (log π − log π_old). With ``ratio="token"`` each token has a ratio of its
    own and its step's advantage, and both means are over tokens. k_n estimates KL(π ‖ π_ref) from a
    token's d = log π − log π_ref: k2 = d²/2, k3 = exp(−d) − 1 + d
    (http://joschu.net/blog/kl-approx.html).

    Where the exponent x of a ratio, or of k3, is above 40, exp(x) follows its tangent,
    e⁴⁰ (1 + x − 40): exp alone is infinite in float32 from 88.8 on, and its product with an
    advantage of 0, or with the 0 that a clipped ratio has for a gradient, would be NaN.

    Args:
        logps_N: (N,) log-probs under π, any float dtype; the gradient flows to them alone.
        old_logps_N: (N,) under the policy that took the actions.
        advantages_S: (S,) of each step's action.
        step_offsets: (S + 1,) int32 or int64, ascending from 0 to N.
        clip: ε > 0.
        ref_logps_N: (N,) under the reference; needed where kl_coef > 0.

    Returns:
        L, a scalar: float32, float64 where an input is. A connected 0 for no steps.

    Raises:
        TypeError: a dtype or number that is none of these.
        ValueError: another shape, device, choice or range; k1 here, whose gradient has mean 0
            whatever the policy; kl_coef without ref_logps_N; advantages that are not finite or
            offsets that do not ascend from 0 to N (neither looked for on CUDA).
    """
    check_floats(("logps_N", logps_N, 1))
    check_floats(("old_logps_N", old_logps_N, 1))
    check_pair("old_logps_N", old_logps_N, "logps_N", logps_N)
    check_floats(("advantages_S", advantages_S, 1))
    check_finite("advantages_S", advantages_S)
    check_positive("clip", clip)
    check_choice("ratio", ratio, RATIOS)
    check_nonnegative("kl_coef", kl_coef)
    check_choice("kl", kl, KL_ESTIMATORS)
    if kl == "k1":
        raise ValueError("kl must be 'k2' or 'k3', got 'k1', whose gradient as a loss has mean 0")
    offsets = as_offsets("step_offsets", step_offsets, logps_N.device)
    check_length("advantages_S", advantages_S, len(offsets) - 1, "step_offsets has steps")

    advantages = advantages_S.detach()
    if ratio == "step":
        log_ratios = step_rewards(logps_N, old_logps_N, offsets, beta=1.0)
    else:
        log_ratios = _differences(logps_N, old_logps_N)
        advantages = advantages.repeat_interleave(offsets.diff())
    count = max(len(log_ratios), 1)
    loss = _clipped(log_ratios, advantages, clip).sum() / count
    if kl_coef:
        if ref_logps_N is None:
            raise ValueError(f"ref_logps_N must be given with kl_coef={kl_coef}, got None")
        loss = loss + kl_coef * kl_terms(logps_N, ref_logps_N, kl).sum() / count
    return loss


def _clipped(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    ratios = ratios_of(log_ratios)
    return -torch.minimum(
        ratios * advantages, ratios.clamp(min=1 - clip, max=1 + clip) * advantages
    )


def kl_terms(logps_N: Tensor, ref_logps_N: Tensor, kl: KLEstimator) -> Tensor:
    """(N,) k1 = d, k2 = d²/2 or k3 = exp(−d) − 1 + d, of d = log π − log π_ref, π_ref constant.

    float32, float64 where an input is; in k3 exp follows its tangent where d < −40, as in
    `ppo_loss`.
    """
    check_floats(("ref_logps_N", ref_logps_N, 1))
    check_pair("ref_logps_N", ref_logps_N, "logps_N", logps_N)
    diff_N = _differences(logps_N, ref_logps_N)
    if kl == "k1":
        return diff_N
    return diff_N**2 / 2 if kl == "k2" else k3(diff_N)


def _differences(logps_N: Tensor, constants_N: Tensor) -> Tensor:
    """Taken in float64, as step_rewards takes them: halves would round what is left of them."""
    diff_N = logps_N.double() - constants_N.detach().double()
    return diff_N.to(compute_dtype(logps_N, constants_N))
