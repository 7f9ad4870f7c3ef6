"""Log-ratio of labels under the logits of a policy and of its reference: a pass over each.

    z = x / T,    log p_y = z_y − log Σ_j exp z_j,    diff = log π(y) − log π_ref(y)

One program a row, rows on grid axis 0. Each of the two rows is folded as in ``token_logprobs.py``,
whose backward this op shares: its gradient is that of log π(y).

Dimensions: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepagent.kernels.online_softmax import (
    IGNORE,
    fold_row,
    join_label,
    load_label,
    softplus,
    tile_shape,
)


@triton.jit
def _logprob_diff_kernel(
    # data
    logits_ptr,
    ref_logits_ptr,
    labels_ptr,
    temperature_ptr,
    diff_ptr,
    logps_ptr,
    max_ptr,
    log_sum_ptr,
    # shapes
    V,
    # strides
    logits_stride_n,
    logits_stride_v,
    ref_logits_stride_n,
    ref_logits_stride_v,
    temperature_stride_n,  # 0: one temperature for all rows
    # constants
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2³¹
    label = tl.load(labels_ptr + row)
    temperature = tl.load(temperature_ptr + row * temperature_stride_n)
    row_ptr = logits_ptr + row * logits_stride_n
    ref_row_ptr = ref_logits_ptr + row * ref_logits_stride_n

    ignored = label == IGNORE
    length = tl.where(ignored, 0, V)  # nothing is read of a row that scores nothing
    max_others, sum_others, _ = fold_row(
        row_ptr, logits_stride_v, length, label, temperature, False, DEPTH, LANES
    )
    ref_max_others, ref_sum_others, _ = fold_row(
        ref_row_ptr, ref_logits_stride_v, length, label, temperature, False, DEPTH, LANES
    )
    z_label = load_label(row_ptr, logits_stride_v, V, label, temperature)
    d, max_all, log_sum_all = join_label(z_label, max_others, sum_others)
    ref_z_label = load_label(ref_row_ptr, ref_logits_stride_v, V, label, temperature)
    ref_d, _, _ = join_label(ref_z_label, ref_max_others, ref_sum_others)
    logp = -softplus(d)

    tl.store(diff_ptr + row, tl.where(ignored, 0.0, logp + softplus(ref_d)))
    tl.store(logps_ptr + row, tl.where(ignored, 0.0, logp))
    tl.store(max_ptr + row, tl.where(ignored, 0.0, max_all))
    tl.store(log_sum_ptr + row, tl.where(ignored, 0.0, log_sum_all))


def logprob_diff(
    logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """diff_N, and of the policy logps_N, max_N and log_sum_N as `token_logprobs` returns them.

    Args:
        logits_NV, ref_logits_NV: (N, V) float32, float16 or bfloat16, any strides.
        labels_N, temperature: as `token_logprobs`.
    """
    N, V = logits_NV.shape
    diff_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    logps_N, max_N, log_sum_N = (torch.empty_like(diff_N) for _ in range(3))
    if N:
        with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
            _logprob_diff_kernel[(N,)](
                logits_NV,
                ref_logits_NV,
                labels_N.contiguous(),
                temperature,
                diff_N,
                logps_N,
                max_N,
                log_sum_N,
                V,
                *logits_NV.stride(),
                *ref_logits_NV.stride(),
                temperature.stride(0) if temperature.ndim else 0,
                **tile_shape(V),
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return diff_N, logps_N, max_N, log_sum_N
