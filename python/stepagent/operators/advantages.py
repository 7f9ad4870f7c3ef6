"""`step_gae` as a custom operator: torch everywhere, Triton on CUDA. No gradient flows.

Computed in float64; results are float32, for float64 inputs float64.

Dimensions: S steps, B trajectories, the longest of L steps; b trajectories that are long
enough.
"""

import torch
from torch import Tensor

from stepagent.checks import check_offsets, compute_dtype
from stepagent.operators import paths


def gae_forward(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Tensor,
    bootstrap_B: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """All trajectories at once, from their ends: as many passes as the longest has steps."""
    if paths.runs_triton(rewards_S, values_S, bootstrap_B):
        from stepagent.kernels.step_gae import step_gae  # loads triton: only here

        return step_gae(rewards_S, values_S, trajectory_offsets, bootstrap_B, gamma, lam)
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


step_gae_op = torch.library.custom_op("stepagent::step_gae", gae_forward, mutates_args=())


@step_gae_op.register_fake
def _(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Tensor,
    bootstrap_B: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(rewards_S, values_S, bootstrap_B)
    S = rewards_S.shape[0]
    return rewards_S.new_empty(S, dtype=dtype), rewards_S.new_empty(S, dtype=dtype)
