"""`step_gae`: generalised advantage estimation over steps. Torch, or on CUDA Triton.

Computed in float64; results are float32, for float64 inputs float64. No gradient flows.

Dimensions: S steps, B trajectories, the longest of L steps; b trajectories that are long
enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stepagent.checks import (
    Index,
    as_offsets,
    check_floats,
    check_fraction,
    check_offsets,
    check_pair,
    compute_dtype,
)
from stepagent.ops import paths
from stepagent.ops.operator import Operator


def step_gae(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Index,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) with an action of the agent as a step.

        δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γλ A_{t+1},    return_t = A_t + V_t

    Every trajectory for itself; A and V are 0 after its last step.

    Args:
        rewards_S: (S,) reward of each step's action, any float dtype.
        values_S: (S,) V of the state that each action was taken in, any float dtype.
        trajectory_offsets: (B + 1,) int32 or int64, ascending from 0 to S; a trajectory is
            [trajectory_offsets[b], trajectory_offsets[b + 1]) and may be empty.
        gamma, lam: γ and λ in [0, 1].
        bootstrap_values: (B,) V after the last step of each trajectory, any float dtype, for
            episodes that were cut off; 0 where the episode ended.

    Returns:
        (advantages_S, returns_S); float32, float64 where an input is float64. Constants: no
        gradient flows to any input.

    Raises:
        TypeError: a dtype that is none of these, or a gamma or lam that is no number.
        ValueError: another shape or device, gamma or lam outside [0, 1], or offsets that do not
            ascend from 0 to S (unchecked on CUDA, where looking at them would stall the stream).
    """
    check_floats(("rewards_S", rewards_S, 1))
    check_floats(("values_S", values_S, 1))
    check_pair("rewards_S", rewards_S, "values_S", values_S)
    check_fraction("gamma", gamma)
    check_fraction("lam", lam)
    offsets = as_offsets("trajectory_offsets", trajectory_offsets, rewards_S.device)
    if bootstrap_values is not None:
        check_floats(("bootstrap_values", bootstrap_values, 1))
        check_pair("bootstrap_values", bootstrap_values, "trajectory_offsets[1:]", offsets[1:])
        bootstrap_values = bootstrap_values.detach()
    constants = (rewards_S.detach(), values_S.detach(), offsets, bootstrap_values)
    return step_gae_op(GaeInputs(*constants, float(gamma), float(lam)))


class GaeInputs(NamedTuple):
    rewards_S: Tensor
    values_S: Tensor
    trajectory_offsets: Tensor
    bootstrap_B: Tensor | None
    gamma: float
    lam: float


def advantages_and_returns(given: GaeInputs) -> tuple[Tensor, Tensor]:
    """All trajectories at once, from their ends: as many passes as the longest has steps."""
    rewards_S, values_S, trajectory_offsets, bootstrap_B, gamma, lam = given
    if paths.runs_triton(rewards_S, values_S, bootstrap_B):
        from stepagent.kernels.step_gae import step_gae  # loads triton: only here

        return step_gae(*given)
    check_offsets("trajectory_offsets", trajectory_offsets, len(rewards_S))
    rewards64_S, values64_S = rewards_S.double(), values_S.double()
    length_B, longest_first_B = trajectory_offsets.diff().sort(descending=True)
    last_B = trajectory_offsets[1:][longest_first_B] - 1
    longer_L = len(length_B) - length_B.bincount().cumsum(0)  # [l]: trajectories longer than l

    advantages_S = torch.empty_like(values64_S)
    advantage_b = next_b = torch.zeros_like(last_B, dtype=torch.float64)
    if bootstrap_B is not None:
        next_b = bootstrap_B[longest_first_B].double()
    for back, count in enumerate(longer_L[:-1].tolist()):
        step_b = last_B[:count] - back
        value_b = values64_S[step_b]
        delta_b = rewards64_S[step_b] + gamma * next_b[:count] - value_b
        advantage_b = delta_b + gamma * lam * advantage_b[:count]
        advantages_S[step_b] = advantage_b
        next_b = value_b
    dtype = compute_dtype(rewards_S, values_S, bootstrap_B)
    return advantages_S.to(dtype), (advantages_S + values64_S).to(dtype)


def _fake(given: GaeInputs) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(given.rewards_S, given.values_S, given.bootstrap_B)
    S = given.rewards_S.shape[0]
    return given.rewards_S.new_empty(S, dtype=dtype), given.rewards_S.new_empty(S, dtype=dtype)


step_gae_op = Operator("step_gae", GaeInputs, advantages_and_returns, _fake)
