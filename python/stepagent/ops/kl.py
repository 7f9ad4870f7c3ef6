"""Estimates of KL(π ‖ π_ref) from log-ratios of sampled tokens."""

import torch
from torch import Tensor


def k3(diff_N: Tensor) -> Tensor:
    """exp(−d) − 1 + d, in float64: near 0 it is d² / 2, the difference of terms as large as d."""
    d_N = diff_N.double()
    return (torch.expm1(-d_N) + d_N).to(diff_N.dtype)
