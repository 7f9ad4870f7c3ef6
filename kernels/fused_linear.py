"""Log-prob and entropy of labels under the logits of a language-model head; no logit is written.

    x = h · wᵀ + b,    z = cap · tanh(x / cap) / T
    log p_y = z_y − log Σ_j exp z_j,    H = −Σ_j p_j log p_j

The first kernel folds the logits other than the label's, a tile of rows and vocabulary at a time
and while they are in registers, into m, s and t of a row and of one split of the vocabulary (x
after the cap, t in units of log 2):

    m = max x,    s = Σ exp((x − m) / T),    t = Σ exp((x − m) / T) (x − m) / T

The second kernel joins the splits of a row, and to them its label (``online_softmax.py``), whose
logit it computes itself: to pick it out of a tile would spill registers.

Batch-invariant: a row's result does not depend on the other rows, on its place among them, on their
number, nor on the number of programs. V alone fixes the splits, a logit is summed over H in one
order that its tile's shape fixes, and nothing is atomic.

Dimensions: n rows, H hidden size, V vocabulary, S splits of the vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepagent.kernels.online_softmax import (
    IGNORE,
    LN_2,
    LOG2_E,
    entropy_of,
    floored,
    join_label,
    softplus,
)

SPLIT = 1024  # vocabulary entries; (m, s, t) take 12 bytes for each, a row of hidden far more
GROUP = 16  # row tiles that go through the vocabulary together
JOIN_ROWS = 4
JOIN_SPLITS = 256  # at least; one kernel for every vocabulary up to 262,144
JOIN_HIDDEN = 256


class Config(NamedTuple):
    """Shape of a tile, and how it is compiled."""

    rows: int
    vocab: int  # divides SPLIT
    hidden: int
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles come by the copy engine of sm_90 and later


# Chosen for no spills and for what fits a GPU's shared memory (tests/test_aot.py), not by timing.
# No loop here is warp-specialised. With descriptors made on the host, Triton 3.6 halves the row
# tile on sm_90 but not the descriptor's box, which then overruns shared memory; 3.9 refuses to
# compile it.
TMA_CONFIGS = {  # by compute capability, without its minor number
    9: Config(128, 256, 64, num_warps=8, num_stages=4, tma=True),
    10: Config(128, 128, 64, num_warps=8, num_stages=4, tma=True),
}
# With a softcap, whose tanh takes registers.
TMA_CAPPED_CONFIG = Config(128, 128, 64, num_warps=8, num_stages=4, tma=True)
CUDA_CONFIG = Config(128, 128, 32, num_warps=8, num_stages=4)
HIP_CONFIG = Config(128, 128, 64, num_warps=8, num_stages=2)
FLOAT32_CONFIG = Config(64, 64, 32, num_warps=4, num_stages=2)  # multiply-adds, on NVIDIA


def is_faster(
    hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None
) -> bool:
    """Whether the kernel was measured to be faster than products and a fold of each.

    On H200, of bfloat16 and V = 128,256, it takes 0.91 of their time at 16 rows and at 1,024, 0.96
    at 8,192, 0.92 at 32,768; with a bias 2.3 of it. Elsewhere it was not measured.
    """
    if bias_V is not None or softcap is not None or hidden_nH.dtype == torch.float32:
        return False
    with torch.cuda.device_of(hidden_nH):
        target = triton.runtime.driver.active.get_current_target()
    hopper = target.backend == "cuda" and target.arch // 10 == 9
    return bool(hopper and _tma_reads(hidden_nH) and _tma_reads(weight_VH))


def choose_config(dtype: torch.dtype, softcap: float | None, tma: bool) -> Config:
    """For the current GPU; `tma`: its copy engine could read these tensors."""
    target = triton.runtime.driver.active.get_current_target()
    if dtype == torch.float32:
        return FLOAT32_CONFIG
    if target.backend == "hip":
        return HIP_CONFIG
    if not tma or target.arch // 10 not in TMA_CONFIGS:
        return CUDA_CONFIG
    return TMA_CONFIGS[target.arch // 10] if softcap is None else TMA_CAPPED_CONFIG


def programs(device: torch.device) -> int:
    """The persistent grid: one a multiprocessor; without a GPU, to compile ahead, just one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _load_tile(
    source,  # a descriptor or a pointer
    row,
    column,
    rows,
    columns,
    stride_row,
    stride_column,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """source[row : row + ROWS, column : column + COLUMNS], with zeros beyond its end."""
    if TMA:
        tile = source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)[:, None]
        j = column + tl.arange(0, COLUMNS)[None, :]
        # i * stride passes 2³¹
        offset = i.to(tl.int64) * stride_row + j.to(tl.int64) * stride_column
        tile = tl.load(source + offset, mask=(i < rows) & (j < columns), other=0.0)
    return tile


@triton.jit
def _tanh(u):
    """tanh to float32 precision, no libdevice; near 0 by Lambert's continued fraction.

    Not the one of ``linear_logprobs.py``, which rounds otherwise: results keep their bits, and with
    `batch_invariant` they are promised.
    """
    near = tl.abs(u) < 0.5
    u2 = u * u
    e = tl.exp2(tl.abs(u) * (-2.0 * LOG2_E))
    numerator = tl.where(near, u * (945.0 + u2 * (105.0 + u2)), 1.0 - e)
    denominator = tl.where(near, 945.0 + u2 * (420.0 + u2 * 15.0), 1.0 + e)
    denominator = tl.where((u < 0) & ~near, -denominator, denominator)
    return numerator / denominator


@triton.jit
def _biased_and_capped(x, bias_ptr, column, inside, softcap):
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit(do_not_specialize=["n"])  # one kernel for every n, which each batch changes
def _fold_kernel(
    # data
    hidden,  # with TMA these two are descriptors
    weight,
    bias_ptr,  # None: no bias
    labels_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,  # None without WITH_ENTROPY
    # shapes
    n,
    V,
    H,
    # strides
    hidden_stride_n,
    hidden_stride_h,
    weight_stride_v,
    weight_stride_h,
    temperature_stride_n,  # 0: one temperature for all rows
    # constants
    softcap,  # None: no cap
    WITH_ENTROPY: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    S = tl.cdiv(V, SPLIT)
    row_tiles = tl.cdiv(n, ROWS)
    for item in range(tl.program_id(0), row_tiles * S, tl.num_programs(0)):
        # Neighbours share a split of the vocabulary, so that its weights leave memory once for the
        # group; a group's hidden rows are few enough to stay in the L2 cache for all splits.
        group = item // (GROUP * S)
        tiles = tl.minimum(row_tiles - group * GROUP, GROUP)
        split = item % (GROUP * S) // tiles
        row = (group * GROUP + item % (GROUP * S) % tiles) * ROWS
        i = row + tl.arange(0, ROWS)
        inside = i < n

        m = tl.full([ROWS], -float("inf"), tl.float32)
        s = tl.zeros([ROWS], tl.float32)
        t = tl.zeros([ROWS], tl.float32)
        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), VOCAB):
            x = tl.zeros([ROWS, VOCAB], tl.float32)
            for k in range(0, H, HIDDEN):
                h = _load_tile(
                    hidden, row, k, n, H, hidden_stride_n, hidden_stride_h, TMA, ROWS, HIDDEN
                )
                w = _load_tile(
                    weight, start, k, V, H, weight_stride_v, weight_stride_h, TMA, VOCAB, HIDDEN
                )
                x = tl.dot(h, w.T, x, input_precision="ieee")

            # Read for each tile anew, as registers are what a tile is short of.
            label = tl.load(labels_ptr + i, mask=inside, other=IGNORE)
            temperature = tl.load(temperature_ptr + i * temperature_stride_n, mask=inside, other=1)
            scale = LOG2_E / temperature
            column = tl.arange(0, VOCAB)
            known = column < V - start
            x = _biased_and_capped(x, bias_ptr, start + column[None, :], known[None, :], softcap)
            # In 32 bits, which any label in this tile fits.
            in_tile = (label >= start) & (label < start + VOCAB)
            label_column = tl.where(in_tile, label - start, -1).to(tl.int32)
            other = known[None, :] & (column[None, :] != label_column[:, None])
            x = tl.where(other, x, -float("inf"))

            new_m = tl.maximum(m, tl.max(x, 1))
            shift = tl.where(new_m == -float("inf"), 0.0, new_m)  # −inf − (−inf) is NaN
            decay = floored((m - shift) * scale)
            shrink = tl.exp2(decay)
            centred = (x - shift[:, None]) * scale[:, None]
            if WITH_ENTROPY:
                centred = floored(centred)
            exp = tl.exp2(centred)
            if WITH_ENTROPY:
                t = shrink * (t + decay * s) + tl.sum(exp * centred, 1)
            s = shrink * s + tl.sum(exp, 1)
            m = new_m

        to = split.to(tl.int64) * n + i
        tl.store(max_ptr + to, m, mask=inside)
        tl.store(sum_ptr + to, s, mask=inside)
        if WITH_ENTROPY:
            tl.store(moment_ptr + to, t, mask=inside)


@triton.jit(do_not_specialize=["n", "S"])
def _join_kernel(
    # data
    hidden_ptr,
    weight_ptr,
    bias_ptr,  # None: no bias
    labels_ptr,
    temperature_ptr,
    split_max_ptr,
    split_sum_ptr,
    split_moment_ptr,  # None without WITH_ENTROPY
    logps_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    # shapes
    n,
    V,
    H,
    S,
    # strides
    hidden_stride_n,
    hidden_stride_h,
    weight_stride_v,
    weight_stride_h,
    temperature_stride_n,  # 0: one temperature for all rows
    # constants
    softcap,  # None: no cap
    WITH_ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,  # at least S
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < n
    i = i.to(tl.int64)
    label = tl.load(labels_ptr + i, mask=inside, other=IGNORE)
    temperature = tl.load(temperature_ptr + i * temperature_stride_n, mask=inside, other=1.0)
    scale = LOG2_E / temperature
    ignored = label == IGNORE
    known = (label >= 0) & (label < V)  # of any other label the result is NaN

    x = tl.zeros([ROWS, HIDDEN], tl.float32)
    hidden_row_ptr = hidden_ptr + i[:, None] * hidden_stride_n
    weight_row_ptr = weight_ptr + label[:, None] * weight_stride_v
    for start in range(0, H, HIDDEN):
        k = (start + tl.arange(0, HIDDEN)).to(tl.int64)[None, :]
        mask = known[:, None] & (k < H)
        h = tl.load(hidden_row_ptr + k * hidden_stride_h, mask=mask, other=0.0)
        w = tl.load(weight_row_ptr + k * weight_stride_h, mask=mask, other=0.0)
        x += h.to(tl.float32) * w.to(tl.float32)
    x_label = _biased_and_capped(tl.sum(x, 1), bias_ptr, label, known, softcap)
    z_label = tl.where(known, x_label / temperature, float("nan"))

    split = tl.arange(0, SPLITS)[None, :]
    at = split.to(tl.int64) * n + i[:, None]
    mask = inside[:, None] & (split < S)
    split_m = tl.load(split_max_ptr + at, mask=mask, other=-float("inf"))
    split_s = tl.load(split_sum_ptr + at, mask=mask, other=0.0)
    m = tl.max(split_m, 1)
    shift = tl.where(m == -float("inf"), 0.0, m)  # −inf − (−inf) is NaN
    decay = floored((split_m - shift[:, None]) * scale[:, None])
    shrink = tl.exp2(decay)
    sum_others = tl.sum(shrink * split_s, 1)
    d, max_all, log_sum_all = join_label(z_label, m / temperature, sum_others)
    logp = -softplus(d)

    tl.store(logps_ptr + i, tl.where(ignored, 0.0, logp), mask=inside)
    tl.store(max_ptr + i, tl.where(ignored, 0.0, max_all), mask=inside)
    tl.store(log_sum_ptr + i, tl.where(ignored, 0.0, log_sum_all), mask=inside)
    entropy = tl.zeros([ROWS], tl.float32)
    if WITH_ENTROPY:
        split_t = tl.load(split_moment_ptr + at, mask=mask, other=0.0)
        moment_others = LN_2 * tl.sum(shrink * (split_t + decay * split_s), 1)
        entropy = tl.where(ignored, 0.0, entropy_of(d, logp, sum_others, moment_others))
    tl.store(entropy_ptr + i, entropy, mask=inside)


def fused_linear_logprobs(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    labels_n: Tensor,
    bias_V: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps_n, entropy_n (0 unless asked for), max_n and log_sum_n = log Σ_j exp(z_j − max).

    All in float32, and batch-invariant: the same bits for a row in any batch. Beyond its results it
    takes S = ⌈V / 1024⌉ times 8 bytes a row, 12 with entropy.

    Args:
        hidden_nH, weight_VH: (n, H) and (V, H), one dtype: float32, float16 or bfloat16, any
            strides.
        labels_n: (n,) int64, any stride; -100 gives 0, any other label outside [0, V) gives NaN.
        bias_V: (V,), any stride, any of these dtypes.
        temperature: () or (n,) float32.
        softcap: x = cap · tanh(x / cap), before the temperature.
    """
    (n, H), V = hidden_nH.shape, weight_VH.shape[0]
    logps_n = torch.empty(n, dtype=torch.float32, device=hidden_nH.device)
    entropy_n, max_n, log_sum_n = (torch.empty_like(logps_n) for _ in range(3))
    if n == 0:
        return logps_n, entropy_n, max_n, log_sum_n

    tma = _tma_reads(hidden_nH) and _tma_reads(weight_VH)
    with torch.cuda.device_of(hidden_nH):  # whose capability counts, not the current device's
        config = choose_config(hidden_nH.dtype, softcap, tma)
    hidden, weight = hidden_nH, weight_VH
    if config.tma:
        hidden = TensorDescriptor.from_tensor(hidden_nH, [config.rows, config.hidden])
        weight = TensorDescriptor.from_tensor(weight_VH, [config.vocab, config.hidden])
    S = triton.cdiv(V, SPLIT)
    items = triton.cdiv(n, config.rows) * S
    split_max_Sn = torch.empty(S, n, dtype=torch.float32, device=hidden_nH.device)
    split_sum_Sn = torch.empty_like(split_max_Sn)
    split_moment_Sn = torch.empty_like(split_max_Sn) if with_entropy else None
    inputs = (None if bias_V is None else bias_V.contiguous(), labels_n.contiguous(), temperature)
    strides = (
        *hidden_nH.stride(),
        *weight_VH.stride(),
        temperature.stride(0) if temperature.ndim else 0,
    )
    with torch.cuda.device_of(hidden_nH):  # Triton launches on the current device
        _fold_kernel[(min(items, programs(hidden_nH.device)),)](
            hidden,
            weight,
            *inputs,
            split_max_Sn,
            split_sum_Sn,
            split_moment_Sn,
            n,
            V,
            H,
            *strides,
            softcap,
            WITH_ENTROPY=with_entropy,
            SPLIT=SPLIT,
            GROUP=GROUP,
            ROWS=config.rows,
            VOCAB=config.vocab,
            HIDDEN=config.hidden,
            TMA=config.tma,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # said here, as Triton 3.10 changes the default
        )
        _join_kernel[(triton.cdiv(n, JOIN_ROWS),)](
            hidden_nH,
            weight_VH,
            *inputs,
            split_max_Sn,
            split_sum_Sn,
            split_moment_Sn,
            logps_n,
            entropy_n,
            max_n,
            log_sum_n,
            n,
            V,
            H,
            S,
            *strides,
            softcap,
            WITH_ENTROPY=with_entropy,
            SPLITS=max(JOIN_SPLITS, triton.next_power_of_2(S)),
            ROWS=JOIN_ROWS,
            HIDDEN=JOIN_HIDDEN,
            enable_fp_fusion=True,
        )
    return logps_n, entropy_n, max_n, log_sum_n


def _tma_reads(matrix: Tensor) -> bool:
    """What the copy engine demands of memory: rows in one piece, all of it in steps of 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0
