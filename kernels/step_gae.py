"""Generalised advantage estimation over steps: a reverse scan of each trajectory.

    δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γλ A_{t+1},    return_t = A_t + V_t

One program a trajectory, trajectories on grid axis 0 (the other axes end at 65,535), tile after
tile from its end. Within a tile A_t = b_t + a_t A_later is a scan of pairs (a, b), which compose as
(a, b) ∘ (a', b') = (a a', b + a b'); the tile begins from the A of the tile after it. All in
float64, in a fixed order.

Dimensions: S steps, B trajectories.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepagent.kernels.segments import segment

BLOCK = 128  # steps in a tile


@triton.jit
def _compose(later_a, later_b, a, b):
    return a * later_a, b + a * later_b


@triton.jit(do_not_specialize=["S"])  # another S for every batch must compile nothing
def _step_gae_kernel(
    # data
    rewards_ptr,
    values_ptr,
    offsets_ptr,
    bootstrap_ptr,  # None without WITH_BOOTSTRAP
    advantages_ptr,
    returns_ptr,
    # shapes
    S: tl.int64,
    # strides
    rewards_stride_s,
    values_stride_s,
    bootstrap_stride_b,
    # constants
    gamma: tl.float64,  # unannotated they would be rounded to float32
    decay: tl.float64,
    WITH_BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    trajectory = tl.program_id(0).to(tl.int64)
    start, stop, _ = segment(offsets_ptr, trajectory, S)
    bootstrap = tl.zeros([], tl.float64)
    if WITH_BOOTSTRAP:
        bootstrap += tl.load(bootstrap_ptr + trajectory * bootstrap_stride_b).to(tl.float64)

    later_advantage = tl.zeros([], tl.float64)
    for done in range(0, stop - start, BLOCK):
        first = stop - done - BLOCK  # may lie before the start
        step = first + tl.arange(0, BLOCK)
        inside = step >= start
        reward = tl.load(rewards_ptr + step * rewards_stride_s, mask=inside, other=0.0)
        value = tl.load(values_ptr + step * values_stride_s, mask=inside, other=0.0)
        ends = step == stop - 1
        next_value = tl.load(
            values_ptr + (step + 1) * values_stride_s, mask=inside & (step + 1 < stop), other=0.0
        )
        next_value = tl.where(ends, bootstrap, next_value.to(tl.float64))
        delta = reward.to(tl.float64) + gamma * next_value - value.to(tl.float64)
        # The last step of the tile takes the advantage of the tile after it.
        b = tl.where(step == first + BLOCK - 1, delta + decay * later_advantage, delta)
        a = tl.zeros([BLOCK], tl.float64) + decay
        _decays, advantage = tl.associative_scan((a, b), 0, _compose, reverse=True)
        tl.store(advantages_ptr + step, advantage, mask=inside)
        tl.store(returns_ptr + step, advantage + value.to(tl.float64), mask=inside)
        later_advantage = tl.sum(tl.where(step == first, advantage, 0.0), 0)


def step_gae(
    rewards_S: Tensor,
    values_S: Tensor,
    trajectory_offsets: Tensor,
    bootstrap_B: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """advantages_S and returns_S, in float32.

    Args:
        rewards_S, values_S: (S,) any float dtypes and strides.
        trajectory_offsets: (B + 1,) int64; where they break the rule the trajectory gets NaN.
        bootstrap_B: (B,) any float dtype and stride; None: the value after a last step is 0.
    """
    S, B = rewards_S.shape[0], trajectory_offsets.shape[0] - 1
    advantages_S = torch.full((S,), torch.nan, dtype=torch.float32, device=rewards_S.device)
    returns_S = advantages_S.clone()
    if B:
        with torch.cuda.device_of(rewards_S):  # Triton launches on the current device
            _step_gae_kernel[(B,)](
                rewards_S,
                values_S,
                trajectory_offsets.contiguous(),
                bootstrap_B,
                advantages_S,
                returns_S,
                S,
                rewards_S.stride(0),
                values_S.stride(0),
                0 if bootstrap_B is None else bootstrap_B.stride(0),
                gamma,
                gamma * lam,
                WITH_BOOTSTRAP=bootstrap_B is not None,
                BLOCK=BLOCK,
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return advantages_S, returns_S
