"""Log-prob and entropy of labels under given logits, and their gradient: a pass over a row each.

    z = x / T,    log p_y = z_y − log Σ_j exp z_j,    H = −Σ_j p_j log p_j

One program a row, rows on grid axis 0 (the other axes end at 65,535). The forward folds the logits
other than the label's, tile after tile in order (``online_softmax.py``), into m, s and t. The label
joins last, with q = 1 − p_y:

    d = log s − (z_y − m),    log p_y = −softplus(d),    log q = −softplus(−d)
    H = −p_y log p_y + q (log s − t / s − log q)

The backward reads the row again, for upstream gradients g of log p_y and g_H of H:

    ∂/∂x_j = (g (1[j = y] − p_j) − g_H p_j (log p_j + H)) / T

with −expm1(log p_y) for 1 − p_y: near 1 a rounded p_y leaves it no digits.

Dimensions: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepagent.kernels.online_softmax import (
    IGNORE,
    LOG2_E,
    entropy_of,
    fold_row,
    grad_label,
    grad_others,
    join_label,
    load_label,
    softplus,
    tile_shape,
    tile_width,
)


@triton.jit
def _token_logprobs_kernel(
    # data
    logits_ptr,
    labels_ptr,
    temperature_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    # shapes
    V,
    # strides
    logits_stride_n,
    logits_stride_v,
    temperature_stride_n,  # 0: one temperature for all rows
    # constants
    WITH_ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2³¹
    label = tl.load(labels_ptr + row)
    temperature = tl.load(temperature_ptr + row * temperature_stride_n)
    row_ptr = logits_ptr + row * logits_stride_n

    ignored = label == IGNORE
    length = tl.where(ignored, 0, V)  # nothing is read of a row that scores nothing
    max_others, sum_others, moment_others = fold_row(
        row_ptr, logits_stride_v, length, label, temperature, WITH_ENTROPY, DEPTH, LANES
    )
    z_label = load_label(row_ptr, logits_stride_v, V, label, temperature)
    d, max_all, log_sum_all = join_label(z_label, max_others, sum_others)
    logp = -softplus(d)

    tl.store(logps_ptr + row, tl.where(ignored, 0.0, logp))
    tl.store(max_ptr + row, tl.where(ignored, 0.0, max_all))
    tl.store(log_sum_ptr + row, tl.where(ignored, 0.0, log_sum_all))
    entropy = 0.0
    if WITH_ENTROPY:
        entropy = tl.where(ignored, 0.0, entropy_of(d, logp, sum_others, moment_others))
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def _token_logprobs_backward_kernel(
    # data
    logits_ptr,
    labels_ptr,
    temperature_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,  # None without WITH_ENTROPY
    grad_logits_ptr,
    # shapes
    V,
    # strides
    logits_stride_n,
    logits_stride_v,
    grad_logits_stride_n,
    grad_logits_stride_v,
    temperature_stride_n,  # 0: one temperature for all rows
    # constants
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2³¹
    label = tl.load(labels_ptr + row)
    temperature = tl.load(temperature_ptr + row * temperature_stride_n)
    row_max = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    logp_label = tl.load(logps_ptr + row)
    grad_logp = tl.load(grad_logps_ptr + row)
    entropy, grad_entropy = 0.0, 0.0
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        grad_entropy = tl.load(grad_entropy_ptr + row)
    own = grad_label(logp_label, entropy, grad_logp, grad_entropy, WITH_ENTROPY)

    row_ptr = logits_ptr + row * logits_stride_n
    grad_row_ptr = grad_logits_ptr + row * grad_logits_stride_n
    ignored = label == IGNORE
    length = tl.where(ignored, 0, V)  # nothing is read of a row that scores nothing
    scale = LOG2_E / temperature
    max_x, log2_sum = row_max * temperature, log_sum * LOG2_E
    grad_logp, grad_entropy, own = (
        grad_logp / temperature,
        grad_entropy / temperature,
        own / temperature,
    )
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset = column.to(tl.int64)
        x = tl.load(row_ptr + offset * logits_stride_v, mask=column < length, other=0.0)
        grad = grad_others(
            x.to(tl.float32), max_x, log2_sum, scale, entropy, grad_logp, grad_entropy, WITH_ENTROPY
        )
        grad = tl.where(column == label.to(tl.int32), own, grad)
        grad = tl.where(ignored, 0.0, grad)
        tl.store(grad_row_ptr + offset * grad_logits_stride_v, grad, mask=column < V)


def token_logprobs(
    logits_NV: Tensor, labels_N: Tensor, temperature: Tensor, *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps_N, entropy_N (0 unless asked for), max_N and log_sum_N = log Σ_j exp(z_j − max).

    All in float32.

    Args:
        logits_NV: (N, V) float32, float16 or bfloat16, any strides.
        labels_N: (N,) int64, any stride; -100 gives 0, any other label outside [0, V) gives NaN.
        temperature: () or (N,) float32.
    """
    N, V = logits_NV.shape
    logps_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    entropy_N, max_N, log_sum_N = (torch.empty_like(logps_N) for _ in range(3))
    if N:
        with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
            _token_logprobs_kernel[(N,)](
                logits_NV,
                labels_N.contiguous(),
                temperature,
                logps_N,
                entropy_N,
                max_N,
                log_sum_N,
                V,
                *logits_NV.stride(),
                temperature.stride(0) if temperature.ndim else 0,
                WITH_ENTROPY=with_entropy,
                **tile_shape(V, narrow=True),
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return logps_N, entropy_N, max_N, log_sum_N


def token_logprobs_backward(
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
    results: list[Tensor],
    logits_NV: Tensor,
    labels_N: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Gradient of logits_NV, in its dtype and layout; 0 for a row whose label is -100.

    Args:
        grad_logps_N, grad_entropy_N: (N,) float32, any stride; None: nothing used the entropy.
        results: what `token_logprobs` returned; its entropy is not read without `grad_entropy_N`.
        logits_NV, labels_N, temperature: as `token_logprobs`.
    """
    N, V = logits_NV.shape
    grad_logits_NV = torch.empty_like(logits_NV)
    if N:
        with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
            _token_logprobs_backward_kernel[(N,)](
                logits_NV,
                labels_N.contiguous(),
                temperature,
                *results,
                grad_logps_N.contiguous(),
                None if grad_entropy_N is None else grad_entropy_N.contiguous(),
                grad_logits_NV,
                V,
                *logits_NV.stride(),
                *grad_logits_NV.stride(),
                temperature.stride(0) if temperature.ndim else 0,
                WITH_ENTROPY=grad_entropy_N is not None,
                BLOCK=tile_width(V),
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return grad_logits_NV
