"""`step_gae` as a custom operator: torch everywhere, Triton on CUDA. No gradient flows.

Computed in float64; results are float32, for float64 inputs float64.

Dimensions: S steps, B trajectories; b trajectories that are long enough.
"""

import torch
from torch import Tensor

from stepagent.checks import check_offsets, compute_dtype
from stepagent.operators.paths import suits_triton


def gae_forward(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Tensor,
    bootstrap_B: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """All trajectories at once, from their ends: as many passes as the longest has steps."""
    check_offsets("trajectory_offsets", trajectory_offsets, len(rewards_S))
    values64_S = values_S.double()
    stop_B, length_B = trajectory_offsets[1:], trajectory_offsets.diff()
    next_S = torch.cat([values64_S[1:], values64_S[:1]])  # the last is one of the ends below
    some_B = length_B > 0
    next_S[stop_B[some_B] - 1] = 0.0 if bootstrap_B is None else bootstrap_B.double()[some_B]

    # Becomes δ, and from the end of each trajectory on A.
    advantages_S = rewards_S.double() + gamma * next_S - values64_S
    for back in range(1, max(length_B.tolist(), default=0)):
        step_b = stop_B[length_B > back] - 1 - back
        advantages_S[step_b] += gamma * lam * advantages_S[step_b + 1]
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


@step_gae_op.register_kernel("cuda")
def gae_forward_cuda(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Tensor,
    bootstrap_B: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    inputs = (rewards_S, values_S, trajectory_offsets, bootstrap_B, gamma, lam)
    if not suits_triton(rewards_S, values_S, bootstrap_B):
        return gae_forward(*inputs)
    from stepagent.kernels.step_gae import step_gae as kernel  # loads triton: only here

    return kernel(*inputs)
