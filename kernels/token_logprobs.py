"""Log-prob and entropy of labels under given logits: one online pass over each row.

    z = x / T,    log p_y = z_y − log Σ_j exp z_j,    H = −Σ_j p_j log p_j

One program a row, rows on grid axis 0 (the other axes end at 65,535). Over the logits other than
the label's it keeps m = max z, s = Σ exp(z − m) and t = Σ exp(z − m)(z − m), tile after tile in
order. The label joins last, with q = 1 − p_y:

    d = log s − (z_y − m),    log p_y = −softplus(d),    log q = −softplus(−d)
    H = −p_y log p_y + q (log s − t / s − log q)

Dimensions: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORE = tl.constexpr(-100)
FLOOR = tl.constexpr(-1.0e4)  # exp(FLOOR) = 0, and unlike −inf it survives a product with 0
MAX_BLOCK = 4096


@triton.jit
def _log1p(y):
    """log(1 + y) = 2 artanh(y / (2 + y)) for y in [0, 1], to float32 precision, no libdevice."""
    r = y / (2.0 + y)
    r2 = r * r
    series = 1.0 / 13 + r2 / 15
    series = 1.0 / 11 + r2 * series
    series = 1.0 / 9 + r2 * series
    series = 1.0 / 7 + r2 * series
    series = 1.0 / 5 + r2 * series
    series = 1.0 / 3 + r2 * series
    return 2.0 * r * (1.0 + r2 * series)


@triton.jit
def _softplus(x):
    return tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2³¹
    label = tl.load(labels_ptr + row)
    temperature = tl.load(temperature_ptr + row * temperature_stride_n)
    row_ptr = logits_ptr + row * logits_stride_n

    max_others = -float("inf")
    sum_others = 0.0
    moment_others = 0.0
    length = tl.where(label == IGNORE, 0, V)  # nothing is read of a row that scores nothing
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(
            row_ptr + column.to(tl.int64) * logits_stride_v, mask=column < V, other=-float("inf")
        )
        z = tl.where(column == label, -float("inf"), x.to(tl.float32) / temperature)
        new_max = tl.maximum(max_others, tl.max(z, 0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # −inf − (−inf) is NaN
        decay = tl.where(max_others == -float("inf"), FLOOR, max_others - shift)
        shrink = tl.exp(decay)
        centred = z - shift
        centred = tl.where(centred < FLOOR, FLOOR, centred)
        exp = tl.exp(centred)
        if WITH_ENTROPY:
            moment_others = shrink * (moment_others + decay * sum_others) + tl.sum(centred * exp, 0)
        sum_others = shrink * sum_others + tl.sum(exp, 0)
        max_others = new_max

    known = (label >= 0) & (label < V)  # of any other label the result is NaN
    x_label = tl.load(row_ptr + label * logits_stride_v, mask=known, other=float("nan"))
    z_label = x_label.to(tl.float32) / temperature
    # With a label of +inf the limit log p = 0 would hide the overflow that made it.
    z_label = tl.where(z_label == float("inf"), float("nan"), z_label)
    log_sum_others = tl.log(sum_others)
    d = log_sum_others - (z_label - max_others)
    logp = -_softplus(d)
    max_all = tl.maximum(max_others, z_label)
    sum_all = sum_others * tl.exp(max_others - max_all) + tl.exp(z_label - max_all)

    ignored = label == IGNORE
    tl.store(logps_ptr + row, tl.where(ignored, 0.0, logp))
    tl.store(max_ptr + row, tl.where(ignored, 0.0, max_all))
    tl.store(log_sum_ptr + row, tl.where(ignored, 0.0, tl.log(sum_all)))
    entropy = 0.0
    if WITH_ENTROPY:
        logq = -_softplus(-d)
        p = tl.exp(logp)
        q = tl.exp(logq)
        label_term = tl.where(p == 0.0, 0.0, -p * logp)
        entropy_others = log_sum_others - moment_others / sum_others
        others_term = tl.where(q == 0.0, 0.0, q * (entropy_others - logq))
        entropy = tl.where(ignored, 0.0, label_term + others_term)
    tl.store(entropy_ptr + row, entropy)


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
                BLOCK=min(triton.next_power_of_2(V), MAX_BLOCK),
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return logps_N, entropy_N, max_N, log_sum_N
