"""Advantages of steps: how much better an action did than its state was worth.

S steps, of B trajectories one after the other. StepAgent's own is `step_gae` or a baseline over the
samples of a state; the others are for comparison, each the method's equation.
"""

import torch
from torch import Tensor

from stepagent.checks import (
    Index,
    as_index,
    as_offsets,
    check_finite,
    check_floats,
    check_length,
    check_nonnegative,
    compute_dtype,
)
from stepagent.ops import step_gae as step_gae
from stepagent.ops import step_sums

LEAST_DEVIATION = 1e-4  # of a group's largest reward: less is what rounding leaves

# ------------------------------------------------- baselines from samples of the same kind


def leave_one_out(rewards_S: Tensor, groups_S: Index) -> Tensor:
    """RLOO (arXiv 2402.14740): each reward less the mean of the others of its group.

        A_s = r_s − 1/(n − 1) Σ_{j ≠ s} r_j = n/(n − 1) (r_s − mean)

    Args:
        rewards_S: (S,) rewards, any float dtype.
        groups_S: (S,) int32 or int64, the group of each, such as the state it was sampled at; any
            numbers in any order.

    Returns:
        advantages_S, which sum to 0 in each group: float32, float64 for float64 rewards, constants.

    Raises:
        TypeError: a dtype that is none of these.
        ValueError: another shape or device, a reward that is not finite, or a group of one, which
            has no others.
    """
    rewards_S, group_S, count_G = _grouped(rewards_S, groups_S)
    alone = count_G[group_S] == 1
    if bool(alone.any()):
        s = int(alone.nonzero()[0])
        raise ValueError(
            f"groups must have two steps or more for leave-one-out, got step {s} alone"
        )
    count_S = count_G[group_S]
    return count_S / (count_S - 1) * _centred(rewards_S, group_S, count_G)


def group_relative(rewards_S: Tensor, groups_S: Index, *, scale: bool = True) -> Tensor:
    """GRPO (arXiv 2402.03300): each reward less its group's mean, over its standard deviation.

        A_s = (r_s − mean) / std,  std² = 1/(n − 1) Σ (r_j − mean)²;  without scale A_s = r_s − mean

    0 where a group's rewards are all equal or it has but one. std is at least 1e-4 of the largest
    |r| in the group: rewards that differ by rounding alone would else count as good and bad.

    Args, Returns, Raises: as `leave_one_out`, whose groups of one are allowed here.
    """
    return _relative(rewards_S, groups_S, scale)


def _relative(
    rewards_S: Tensor, groups_S: Index, scale: bool, sizes_S: Tensor | None = None
) -> Tensor:
    """Args: sizes_S: of what the rewards were added from, which may cancel; None: |r|."""
    dtype = compute_dtype(rewards_S)
    rewards_S, group_S, count_G = _grouped(rewards_S, groups_S)
    if not scale:
        return _centred(rewards_S, group_S, count_G)
    sizes_S = (rewards_S if sizes_S is None else sizes_S).abs().double()
    largest_G = torch.zeros_like(count_G, dtype=torch.float64)
    largest_S = largest_G.scatter_reduce_(0, group_S, sizes_S, "amax")[group_S]
    # In units of the largest, whatever its size, squares neither overflow nor vanish.
    units_S = rewards_S.double() / torch.where(largest_S > 0, largest_S, 1.0)
    count_G = count_G.double()
    centred_S = _centred(units_S, group_S, count_G)
    squares_G = torch.zeros_like(count_G).index_add_(0, group_S, centred_S**2)
    std_S = (squares_G / (count_G - 1).clamp(min=1)).sqrt()[group_S]
    return (centred_S / std_S.clamp(min=LEAST_DEVIATION)).to(dtype)


def standardised(rewards_S: Tensor) -> Tensor:
    """To mean 0 and deviation 1 over all; the deviation is floored as `group_relative` says."""
    floor = LEAST_DEVIATION * rewards_S.abs().amax()
    deviation = torch.maximum(rewards_S.std(correction=0), floor)
    return (rewards_S - rewards_S.mean()) / torch.where(deviation > 0, deviation, 1.0)


def _grouped(rewards_S: Tensor, groups_S: Index) -> tuple[Tensor, Tensor, Tensor]:
    """The rewards as constants, the groups as 0 … G − 1, and their sizes (G,) as floats."""
    check_floats(("rewards_S", rewards_S, 1))
    check_finite("rewards_S", rewards_S)
    groups_S = as_index("groups_S", groups_S, rewards_S.device)
    check_length("groups_S", groups_S, len(rewards_S), "rewards_S has steps")
    rewards_S = rewards_S.detach().to(compute_dtype(rewards_S))
    _, group_S, count_G = torch.unique(groups_S, return_inverse=True, return_counts=True)
    return rewards_S, group_S, count_G.to(rewards_S.dtype)


def _centred(rewards_S: Tensor, group_S: Tensor, count_G: Tensor) -> Tensor:
    """Less the group's mean; exactly 0 where all are equal, for the first is subtracted before."""
    start_G = (count_G.cumsum(0) - count_G).long()
    first_G = rewards_S[torch.argsort(group_S, stable=True)[start_G]]
    shifted_S = rewards_S - first_G[group_S]
    mean_G = torch.zeros_like(count_G).index_add_(0, group_S, shifted_S) / count_G
    return shifted_S - mean_G[group_S]


# ----------------------------------------------- what other step-level methods make of rewards


def gigpo(
    rewards_S: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    state_groups_S: Index,
    *,
    gamma: float = 0.95,
    omega: float = 1.0,
    scale: bool = False,
) -> Tensor:
    """GiGPO (arXiv 2505.10978): how good the trajectory was, and the step among equal states.

        A_s = A^E + ω A^S,  A^E = (R(τ) − mean) / F over trajectories of one task, R(τ) = Σ r,
        A^S = (R_t − mean) / F over steps at one state, R_t = Σ_{k ≥ t} γ^{k−t} r_k

    F is 1, with scale the standard deviation, at least 1e-4 of the largest R that the group would
    have without signs (rounding, where rewards cancel); a state met once has A^S = 0.

    Args:
        rewards_S: (S,) rewards of the steps of B trajectories, any float dtype.
        trajectory_offsets: (B + 1,) as in `step_gae`.
        trajectory_groups_B: (B,) the task of each trajectory.
        state_groups_S: (S,) the state of each step: equal numbers for equal states of one task.

    Returns, Raises: as `group_relative`.
    """
    offsets = _offsets(trajectory_offsets, rewards_S)
    check_nonnegative("omega", omega)
    rewards_S = rewards_S.detach()
    sizes_S, zeros_S = rewards_S.abs(), torch.zeros_like(rewards_S)
    sums_B, sizes_B = step_sums(rewards_S, offsets), step_sums(sizes_S, offsets)
    episode_B = _relative(sums_B, trajectory_groups_B, scale, sizes_B)
    returns_S, _ = step_gae(rewards_S, zeros_S, offsets, gamma=gamma, lam=1.0)
    sizes_S, _ = step_gae(sizes_S, zeros_S, offsets, gamma=gamma, lam=1.0)
    step_S = _relative(returns_S, state_groups_S, scale, sizes_S)
    return episode_B.repeat_interleave(offsets.diff()) + omega * step_S


def istar(
    outcomes_B: Tensor,
    step_rewards_S: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    *,
    omega: float = 1.0,
    scale: bool = True,
) -> Tensor:
    """iStar (arXiv 2509.19199): the outcome's advantage and that of the implicit step reward.

        A_s = A^ep + ω A^st,  both group-relative: of outcomes over the trajectories of a task,
        of step rewards r_t = β Σ_tok [log π_φ − log π_old] over all steps of these

    The step rewards are `step_rewards`, and log π_φ learns by `implicit_step_loss` on sums over a
    trajectory that succeeded and one that failed.

    Args:
        outcomes_B: (B,) reward of each trajectory. step_rewards_S: (S,). Both any float dtype.
        trajectory_offsets, trajectory_groups_B: as in `gigpo`.
        scale: divide both by their groups' deviations.

    Returns, Raises: as `group_relative`.
    """
    offsets = _offsets(trajectory_offsets, step_rewards_S)
    check_nonnegative("omega", omega)
    groups_B = as_index("trajectory_groups_B", trajectory_groups_B, outcomes_B.device)
    check_length("trajectory_groups_B", groups_B, len(offsets) - 1, "trajectory_offsets says")
    lengths_B = offsets.diff()
    outcome_B = group_relative(outcomes_B, groups_B, scale=scale)
    step_groups_S = groups_B.repeat_interleave(lengths_B)
    step_S = group_relative(step_rewards_S, step_groups_S, scale=scale)
    return outcome_B.repeat_interleave(lengths_B) + omega * step_S


def prime(
    outcomes_B: Tensor,
    token_rewards_N: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """PRIME (arXiv 2502.01456): token-wise implicit rewards and outcomes, each leave-one-out.

        A_n = Σ_{m ≥ n} γ^{m−n} [r_m − r̄_other] + (o − ō_other)

    r = β (log π_φ − log π_ref) per token; r̄_other is the mean, over the other trajectories of the
    task, of their mean r, and ō_other that of their outcomes. π_φ learns by `outcome_loss`. (The
    weighting of r̄ is our reading of the paper.)

    Args:
        outcomes_B: (B,). token_rewards_N: (N,), of B trajectories. Both any float dtype.
        trajectory_offsets: (B + 1,) into the tokens; none empty. trajectory_groups_B: (B,).

    Returns, Raises: as `leave_one_out`; ValueError for a trajectory without tokens.
    """
    offsets = _offsets(trajectory_offsets, token_rewards_N)
    lengths_B = offsets.diff()
    if bool((lengths_B == 0).any()):
        raise ValueError(f"trajectory {int((lengths_B == 0).nonzero()[0])} has no tokens")
    mean_B = step_sums(token_rewards_N, offsets) / lengths_B
    others_B = mean_B - leave_one_out(mean_B, trajectory_groups_B)
    outcome_B = leave_one_out(outcomes_B, trajectory_groups_B)
    left_N = token_rewards_N - others_B.repeat_interleave(lengths_B)
    returns_N, _ = step_gae(left_N, torch.zeros_like(left_N), offsets, gamma=gamma, lam=1.0)
    return returns_N + outcome_B.repeat_interleave(lengths_B)


def mt_grpo(
    turn_rewards_B: Tensor,
    outcomes_B: Tensor,
    trajectory_offsets: Index,
    trajectory_groups_B: Index,
    tool_steps_B: Index,
    *,
    lam: float = 1.0,
) -> Tensor:
    """MT-GRPO (arXiv 2505.11821): the tool's turn earns a reward of its own.

        A_s = A_O + λ A_T up to and with the step that calls the tool, A_O after it

    A_O is the outcomes' group-relative advantage, A_T that of the turn rewards.

    Args:
        turn_rewards_B, outcomes_B: (B,), any float dtype.
        trajectory_offsets, trajectory_groups_B: as in `gigpo`.
        tool_steps_B: (B,) which step of each trajectory calls the tool, from 0.

    Returns, Raises: as `group_relative`; ValueError for a tool step that its trajectory lacks.
    """
    offsets = as_offsets("trajectory_offsets", trajectory_offsets, outcomes_B.device)
    tool_B = as_index("tool_steps_B", tool_steps_B, outcomes_B.device)
    lengths_B = offsets.diff()
    check_length("tool_steps_B", tool_B, len(lengths_B), "trajectory_offsets has trajectories")
    outside = (tool_B < 0) | (tool_B >= lengths_B)
    if bool(outside.any()):
        b = int(outside.nonzero()[0])
        raise ValueError(
            f"tool_steps_B[{b}] must fit the trajectory's {int(lengths_B[b])} steps, "
            f"got {int(tool_B[b])}"
        )
    outcome_B = group_relative(outcomes_B, trajectory_groups_B)
    turn_B = group_relative(turn_rewards_B, trajectory_groups_B)
    step_S = torch.arange(int(offsets[-1]), device=offsets.device)
    until_S = step_S <= (offsets[:-1] + tool_B).repeat_interleave(lengths_B)
    spread = outcome_B.repeat_interleave(lengths_B), turn_B.repeat_interleave(lengths_B)
    return spread[0] + lam * until_S * spread[1]


def _offsets(trajectory_offsets: Index, values: Tensor) -> Tensor:
    check_floats(("rewards", values, 1))
    return as_offsets("trajectory_offsets", trajectory_offsets, values.device)
