"""One slice of the vocabulary, as products h · wᵀ in float32, into running sums; and its gradient.

    x = product + b,    z = cap · tanh(x / cap) / T

The hybrid of ``ops/linear.py``: the math library multiplies a slice, these kernels read it
once (twice, where they also write weights). One program a token, tokens on grid axis 0 (the other
axes end at 65,535). A slice is folded tile after tile in order, into state from which the next
slice goes on.

Dimensions: n tokens, w vocabulary entries of the slice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepagent.kernels.online_softmax import (
    IGNORE,
    LOG2_E,
    entropy_of,
    expm1,
    floored,
    fold_tile,
    grad_label,
    grad_others,
    join_folds,
    join_label,
    softplus,
    tile_shape,
    tile_width,
)

WIDEST_WEIGHED = 16384  # vocabulary entries of a slice whose row a program holds in registers
WEIGHED_PER_THREAD = 32
FINISH_BLOCK = 256  # tokens a program


@triton.jit
def _tanh(u):
    """To float32 precision near 0 too: −expm1(−2|u|) / (2 + expm1(−2|u|)) with the sign of u."""
    e = expm1(-2.0 * tl.abs(u))
    t = -e / (2.0 + e)
    return tl.where(u < 0, -t, t)


@triton.jit
def _load(
    row_ptr,
    bias_ptr,
    column,
    w,
    softcap,
    WITH_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """x of these columns after bias and cap, and the softcap's slope.

    x is −inf outside the slice and where the product is: there a token may not draw.
    """
    inside = (column >= 0) & (column < w)
    x = tl.load(row_ptr + column, mask=inside, other=-float("inf"))
    barred = x == -float("inf")
    if WITH_BIAS:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if CAPPED:
        t = _tanh(x / softcap)
        slope = 1.0 - t * t
        x = tl.where(barred, -float("inf"), softcap * t)
    return x, slope


@triton.jit
def _join_slice(max_ptr, sum_ptr, token, new, sums):
    """Join a slice's max and sum to what there was; the shift, and the decay of each."""
    old = tl.load(max_ptr + token)
    new_max = tl.maximum(old, new)
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # −inf − (−inf) is NaN
    old_decay, new_decay = floored(old - shift), floored(new - shift)
    old_sum = tl.load(sum_ptr + token)
    tl.store(max_ptr + token, new_max)
    tl.store(sum_ptr + token, tl.exp(old_decay) * old_sum + tl.exp(new_decay) * sums)
    return shift, old_decay, new_decay, old_sum


@triton.jit
def _fold_slice_kernel(
    # data
    products_ptr,
    bias_ptr,  # None without WITH_BIAS
    labels_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    label_ptr,
    # shapes
    w,
    start,
    # strides
    products_stride_n,
    temperature_stride_n,  # 0: one temperature for all tokens
    # constants
    softcap,
    WITH_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WITH_MOMENT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # token * stride passes 2³¹
    label = tl.load(labels_ptr + token)
    temperature = tl.load(temperature_ptr + token * temperature_stride_n)
    row_ptr = products_ptr + token * products_stride_n
    local = (label - start).to(tl.int32)
    here = (label >= start) & (label < start + w)
    length = tl.where(label == IGNORE, 0, w)  # nothing is read of a token that scores nothing

    # The slice by itself, then what there was before.
    scale = LOG2_E / temperature
    m = tl.full([LANES], -float("inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    place = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for first in range(0, length, DEPTH * LANES):
        x, _ = _load(row_ptr, bias_ptr, first + place, w, softcap, WITH_BIAS, CAPPED)
        x = tl.where(first + place == local, -float("inf"), x)
        m, s, t = fold_tile(m, s, t, x, scale, WITH_MOMENT)
    top, sums, moments = join_folds(m, s, t, scale, 0)
    _shift, old_decay, new_decay, old_sum = _join_slice(
        max_ptr, sum_ptr, token, top / temperature, sums
    )
    if WITH_MOMENT:
        old_moment = tl.load(moment_ptr + token)
        moments = tl.exp(new_decay) * (moments + new_decay * sums)
        moments += tl.exp(old_decay) * (old_moment + old_decay * old_sum)
        tl.store(moment_ptr + token, moments)
    x_label, _ = _load(row_ptr, bias_ptr, local, w, softcap, WITH_BIAS, CAPPED)
    tl.store(label_ptr + token, x_label / temperature, mask=here)


@triton.jit
def _weigh_slice_kernel(
    # data
    products_ptr,
    bias_ptr,  # None without WITH_BIAS
    labels_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    label_ptr,
    shrink_ptr,
    weights_ptr,
    # shapes
    w,
    start,
    # strides
    products_stride_n,
    weights_stride_n,
    temperature_stride_n,  # 0: one temperature for all tokens
    # constants
    softcap,
    WITH_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,  # the whole row, at least w
):
    token = tl.program_id(0).to(tl.int64)  # token * stride passes 2³¹
    label = tl.load(labels_ptr + token)
    temperature = tl.load(temperature_ptr + token * temperature_stride_n)
    row_ptr = products_ptr + token * products_stride_n
    local = (label - start).to(tl.int32)
    here = (label >= start) & (label < start + w)
    length = tl.where(label == IGNORE, 0, w)  # nothing is read of a token that scores nothing

    column = tl.arange(0, BLOCK)
    x, slope = _load(row_ptr, bias_ptr, column, length, softcap, WITH_BIAS, CAPPED)
    x = tl.where(column == local, -float("inf"), x)
    top = tl.max(x, 0)
    scale = LOG2_E / temperature
    shift_x = tl.where(top == -float("inf"), 0.0, top)
    exp = tl.exp2((x - shift_x) * scale)
    new = top / temperature
    _shift, old_decay, new_decay, _old = _join_slice(max_ptr, sum_ptr, token, new, tl.sum(exp, 0))
    tl.store(shrink_ptr + token, tl.exp(old_decay))
    weights_row_ptr = weights_ptr + token * weights_stride_n
    tl.store(weights_row_ptr + column, exp * tl.exp(new_decay) * slope, mask=column < w)
    x_label, _ = _load(row_ptr, bias_ptr, local, w, softcap, WITH_BIAS, CAPPED)
    tl.store(label_ptr + token, x_label / temperature, mask=here)


@triton.jit
def _grad_slice_kernel(
    # data
    products_ptr,
    bias_ptr,  # None without WITH_BIAS
    labels_ptr,
    temperature_ptr,
    logps_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,  # None without WITH_ENTROPY
    grad_ptr,
    # shapes
    w,
    start,
    # strides
    products_stride_n,
    grad_stride_n,
    temperature_stride_n,  # 0: one temperature for all tokens
    # constants
    softcap,
    WITH_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # token * stride passes 2³¹
    label = tl.load(labels_ptr + token)
    temperature = tl.load(temperature_ptr + token * temperature_stride_n)
    scale = LOG2_E / temperature
    max_x = tl.load(max_ptr + token) * temperature
    log2_sum = tl.load(log_sum_ptr + token) * LOG2_E
    logp_label = tl.load(logps_ptr + token)
    grad_logp = tl.load(grad_logps_ptr + token)
    entropy, grad_entropy = 0.0, 0.0
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + token)
        grad_entropy = tl.load(grad_entropy_ptr + token)
    own = grad_label(logp_label, entropy, grad_logp, grad_entropy, WITH_ENTROPY)
    row_ptr = products_ptr + token * products_stride_n
    grad_row_ptr = grad_ptr + token * grad_stride_n
    local = (label - start).to(tl.int32)
    for first in range(0, w, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x, slope = _load(row_ptr, bias_ptr, column, w, softcap, WITH_BIAS, CAPPED)
        grad = grad_others(
            x, max_x, log2_sum, scale, entropy, grad_logp, grad_entropy, WITH_ENTROPY
        )
        grad = tl.where(column == local, own, grad) * slope
        grad = tl.where(label == IGNORE, 0.0, grad)
        tl.store(grad_row_ptr + column, grad, mask=column < w)


@triton.jit(do_not_specialize=["n"])
def _finish_kernel(
    # data
    labels_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    label_ptr,
    logps_ptr,
    entropy_ptr,
    max_all_ptr,
    log_sum_ptr,
    # shapes
    n,
    # constants
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < n
    ignored = tl.load(labels_ptr + token, mask=inside, other=IGNORE) == IGNORE
    sum_others = tl.load(sum_ptr + token, mask=inside, other=1.0)
    max_others = tl.load(max_ptr + token, mask=inside, other=0.0)
    z_label = tl.load(label_ptr + token, mask=inside, other=0.0)
    d, max_all, log_sum = join_label(z_label, max_others, sum_others)
    logp = -softplus(d)
    entropy = tl.zeros([BLOCK], tl.float32)
    if WITH_ENTROPY:
        moment = tl.load(moment_ptr + token, mask=inside, other=0.0)
        entropy = entropy_of(d, logp, sum_others, moment)
    tl.store(logps_ptr + token, tl.where(ignored, 0.0, logp), mask=inside)
    tl.store(entropy_ptr + token, tl.where(ignored, 0.0, entropy), mask=inside)
    tl.store(max_all_ptr + token, tl.where(ignored, 0.0, max_all), mask=inside)
    tl.store(log_sum_ptr + token, tl.where(ignored, 0.0, log_sum), mask=inside)


def rows_like(products_nw: Tensor, dtype: torch.dtype) -> Tensor:
    """Room of this shape, whose rows begin at multiples of 16 bytes, as fast products want."""
    n, w = products_nw.shape
    per_16_bytes = 16 // dtype.itemsize
    padded = triton.cdiv(w, per_16_bytes) * per_16_bytes
    return torch.empty(n, padded, dtype=dtype, device=products_nw.device)[:, :w]


def fold_slice(
    labels_n: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    products_nw: Tensor,
    bias_w: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    start: int,
    *,
    with_entropy: bool,
) -> None:
    """Fold the products of vocabulary entries start, start + 1, … into the state, in place.

    Args:
        labels_n: (n,) int64; -100 leaves the state as it is.
        state: of each token, (n,) float32: max, Σ exp(z − max) and Σ exp(z − max)(z − max) over the
            logits but the label's, and the label's logit.
        products_nw: (n, w) float32, contiguous rows.
        bias_w: (w,) any float dtype, contiguous.
        temperature: () or (n, 1) float32.
    """
    n, w = products_nw.shape
    if n:
        with torch.cuda.device_of(products_nw):  # Triton launches on the current device
            _fold_slice_kernel[(n,)](
                products_nw,
                bias_w,
                labels_n,
                temperature,
                *state,
                w,
                start,
                products_nw.stride(0),
                temperature.stride(0) if temperature.ndim else 0,
                1.0 if softcap is None else softcap,
                WITH_BIAS=bias_w is not None,
                CAPPED=softcap is not None,
                WITH_MOMENT=with_entropy,
                **tile_shape(w, narrow=with_entropy),  # of Triton 3.9's wide tiles, one spills
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )


def weigh_slice(
    labels_n: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    products_nw: Tensor,
    bias_w: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    start: int,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """`fold_slice` that reads a row once and returns exp(z − max) s, s the slope of the softcap.

    (n, w) in `dtype`; 0 for the label, and for a token whose label is -100.

    Args:
        state: of each token, (n,) float32: max, Σ exp(z − max), the label's logit, and by how much
            this slice shrank the sum.
        products_nw: as in `fold_slice`, w at most `WIDEST_WEIGHED`.
    """
    n, w = products_nw.shape
    weights_nw = rows_like(products_nw, dtype)
    block = int(triton.next_power_of_2(w))
    if n:
        with torch.cuda.device_of(products_nw):  # Triton launches on the current device
            _weigh_slice_kernel[(n,)](
                products_nw,
                bias_w,
                labels_n,
                temperature,
                *state,
                weights_nw,
                w,
                start,
                products_nw.stride(0),
                weights_nw.stride(0),
                temperature.stride(0) if temperature.ndim else 0,
                1.0 if softcap is None else softcap,
                WITH_BIAS=bias_w is not None,
                CAPPED=softcap is not None,
                BLOCK=block,
                num_warps=min(max(block // (32 * WEIGHED_PER_THREAD), 1), 16),
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return weights_nw


def finish(
    labels_n: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor], *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps_n, entropy_n (0 unless asked for), max_n and log_sum_n, once all slices are folded.

    Args:
        labels_n: (n,) int64, contiguous; -100 gives 0.
        state: the first four of `fold_slice`; a label whose logit is still NaN gives NaN.
    """
    n = labels_n.shape[0]
    logps_n = torch.empty(n, dtype=torch.float32, device=labels_n.device)
    entropy_n, max_n, log_sum_n = (torch.empty_like(logps_n) for _ in range(3))
    if n:
        with torch.cuda.device_of(labels_n):  # Triton launches on the current device
            _finish_kernel[(triton.cdiv(n, FINISH_BLOCK),)](
                labels_n,
                *state,
                logps_n,
                entropy_n,
                max_n,
                log_sum_n,
                n,
                WITH_ENTROPY=with_entropy,
                BLOCK=FINISH_BLOCK,
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return logps_n, entropy_n, max_n, log_sum_n


def grad_slice(
    labels_n: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_logps_n: Tensor,
    grad_entropy_n: Tensor | None,
    products_nw: Tensor,
    bias_w: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    start: int,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the products, (n, w) in `dtype`; 0 for a token whose label is -100.

    Args:
        results: logps_n, entropy_n, max_n, log_sum_n, as of `token_logprobs`.
        grad_logps_n, grad_entropy_n: (n,) float32, already over the temperature.
        labels_n, products_nw, bias_w, temperature, softcap, start: as in `fold_slice`.
    """
    n, w = products_nw.shape
    grad_nw = rows_like(products_nw, dtype)
    if n:
        with torch.cuda.device_of(products_nw):  # Triton launches on the current device
            _grad_slice_kernel[(n,)](
                products_nw,
                bias_w,
                labels_n,
                temperature,
                *results,
                grad_logps_n,
                grad_entropy_n,
                grad_nw,
                w,
                start,
                products_nw.stride(0),
                grad_nw.stride(0),
                temperature.stride(0) if temperature.ndim else 0,
                1.0 if softcap is None else softcap,
                WITH_BIAS=bias_w is not None,
                CAPPED=softcap is not None,
                WITH_ENTROPY=grad_entropy_n is not None,
                BLOCK=tile_width(w),
                enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
            )
    return grad_nw
