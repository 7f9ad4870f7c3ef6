"""Advantages of steps: how much better an action did than its state was worth.

S steps, of B trajectories one after the other.
"""

from torch import Tensor

from stepagent.checks import (
    Index,
    as_offsets,
    check_floats,
    check_fraction,
    check_pair,
)
from stepagent.operators.advantages import step_gae_op


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
    advantages_S, returns_S = step_gae_op(*constants, float(gamma), float(lam))
    return advantages_S, returns_S
