"""Ratios of probabilities from their logarithms, without overflow; the KL that they estimate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A ratio is exp(d) up to d = 40, and from there on goes along its tangent, e⁴⁰ (1 + d − 40). The
# exponential alone is infinite in float32 from d = 88.8 on, and inf · 0 makes a gradient NaN. At
# e⁴⁰ nothing is distorted that one would learn from, and the norm of such a gradient still has a
# square in float32, 5.5e34. Unlike a clamp, a tangent keeps the gradient, which pulls an action
# back that became far too likely.
LARGEST_LOG_RATIO = 40.0


def ratios_of(log_ratios: Tensor) -> Tensor:
    """exp(d), its tangent beyond LARGEST_LOG_RATIO."""
    beyond = F.relu(log_ratios - LARGEST_LOG_RATIO)
    return log_ratios.clamp(max=LARGEST_LOG_RATIO).exp() * (1 + beyond)


def k3(diff_N: Tensor) -> Tensor:
    """ρ − 1 + d with ρ = exp(−d), its tangent beyond LARGEST_LOG_RATIO; in the dtype of d.

    In float64: near 0 it is d² / 2, the difference of terms as large as d.
    """
    falls_N = -diff_N.double()
    within_N = falls_N.clamp(max=LARGEST_LOG_RATIO)
    beyond_N = F.relu(falls_N - LARGEST_LOG_RATIO) * math.expm1(LARGEST_LOG_RATIO)
    return (torch.expm1(within_N) - within_N + beyond_N).to(diff_N.dtype)
