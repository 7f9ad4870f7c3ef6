"""The online softmax that the kernels share: a row of logits, tile after tile, its label apart.

    z = x / T,    m = max z,    s = Σ exp(z − m),    t = Σ exp(z − m)(z − m)

m, s and t run over the logits other than the label's; a larger maximum rescales s and t. A tile is
(DEPTH, LANES), and each lane keeps m, s and t of its own, so that no tile waits for a sum over
threads; the lanes join at the end of the row, always in the same order. Inside, m is of x and the
exponents are of 2: one subtraction, one product and one exp2 a logit. The label joins last: with
d = log s − (z_y − m) its log-prob is −softplus(d), which keeps its digits where the probability is
close to 1.
"""

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)
FLOOR = tl.constexpr(-1.0e4)  # exp(FLOOR) = 0, and unlike −inf it survives a product with 0
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_BLOCK = 4096  # logits in a tile


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
def softplus(x):
    return tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expm1(x):
    """exp(x) − 1 for x <= 0, to float32 precision: Taylor's series where the difference cancels."""
    series = 1.0 + x / 9
    series = 1.0 + x / 8 * series
    series = 1.0 + x / 7 * series
    series = 1.0 + x / 6 * series
    series = 1.0 + x / 5 * series
    series = 1.0 + x / 4 * series
    series = 1.0 + x / 3 * series
    series = 1.0 + x / 2 * series
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def floored(x):
    """max(x, FLOOR), which lets NaN through."""
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def fold_tile(m, s, t, x, scale, WITH_MOMENT: tl.constexpr):
    """m, s and t of each lane (LANES,) after one more tile; t is in units of log 2.

    x: (DEPTH, LANES), -inf where there is nothing to fold; scale: log2(e) / T.
    """
    new_m = tl.maximum(m, tl.max(x, 0))
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)  # −inf − (−inf) is NaN
    decay = floored((m - shift) * scale)
    shrink = tl.exp2(decay)
    centred = (x - shift[None, :]) * scale
    if WITH_MOMENT:
        centred = floored(centred)
    exp = tl.exp2(centred)
    if WITH_MOMENT:
        t = shrink * (t + decay * s) + tl.sum(exp * centred, 0)
    return new_m, shrink * s + tl.sum(exp, 0), t


@triton.jit
def join_folds(m, s, t, scale, axis: tl.constexpr):
    """m of x, s and t of a row, from those of its parts along `axis`; t leaves units of log 2."""
    top = tl.max(m, axis)
    shift = tl.where(top == -float("inf"), 0.0, top)
    decay = floored((m - tl.expand_dims(shift, axis)) * scale)
    shrink = tl.exp2(decay)
    moment = LN_2 * tl.sum(shrink * (t + decay * s), axis)
    return top, tl.sum(shrink * s, axis), moment


@triton.jit
def fold_row(
    row_ptr,
    stride_v,
    V,
    label,
    temperature,
    WITH_MOMENT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """m, s and t of a row of logits other than its label's."""
    scale = LOG2_E / temperature
    m = tl.full([LANES], -float("inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    place = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = V // (DEPTH * LANES) * (DEPTH * LANES)
    for start in range(0, whole, DEPTH * LANES):
        x = tl.load(row_ptr + (start + place).to(tl.int64) * stride_v).to(tl.float32)
        x = tl.where(place == (label - start).to(tl.int32), -float("inf"), x)
        m, s, t = fold_tile(m, s, t, x, scale, WITH_MOMENT)
    if whole < V:
        column = whole + place
        inside = column < V
        x = tl.load(row_ptr + column.to(tl.int64) * stride_v, mask=inside, other=-float("inf"))
        x = tl.where(column == label.to(tl.int32), -float("inf"), x.to(tl.float32))
        m, s, t = fold_tile(m, s, t, x, scale, WITH_MOMENT)
    top, sums, moment = join_folds(m, s, t, scale, 0)
    return top / temperature, sums, moment


@triton.jit
def load_label(row_ptr, stride_v, V, label, temperature):
    """z of the label, NaN where it is outside the vocabulary."""
    known = (label >= 0) & (label < V)
    x_label = tl.load(row_ptr + label * stride_v, mask=known, other=float("nan"))
    return x_label.to(tl.float32) / temperature


@triton.jit
def join_label(z_label, max_others, sum_others):
    """d of the label, and max and log Σ exp(z − max) over the whole row."""
    # With a label of +inf the limit log p = 0 would hide the overflow that made it.
    z_label = tl.where(z_label == float("inf"), float("nan"), z_label)
    d = tl.log(sum_others) - (z_label - max_others)
    max_all = tl.maximum(max_others, z_label)
    sum_all = sum_others * tl.exp(max_others - max_all) + tl.exp(z_label - max_all)
    return d, max_all, tl.log(sum_all)


@triton.jit
def grad_others(
    x, max_x, log2_sum, scale, entropy, grad_logp, grad_entropy, WITH_ENTROPY: tl.constexpr
):
    """−(g + g_H (log p_j + H)) p_j: the gradients of logits z_j other than the label's.

    max_x: the maximum of x = z T; log2_sum: log2 Σ_j exp(z_j − max z); scale: log2(e) / T.
    """
    log2_p = (x - max_x) * scale - log2_sum
    pull = grad_logp
    if WITH_ENTROPY:
        log2_p = floored(log2_p)
        pull += grad_entropy * (LN_2 * log2_p + entropy)
    return -pull * tl.exp2(log2_p)


@triton.jit
def grad_label(logp, entropy, grad_logp, grad_entropy, WITH_ENTROPY: tl.constexpr):
    """g (1 − p) − g_H p (log p + H): that of the label's, whose 1 − p keeps its digits."""
    grad = -expm1(logp) * grad_logp
    if WITH_ENTROPY:
        grad -= grad_entropy * tl.exp(logp) * (floored(logp) + entropy)
    return grad


@triton.jit
def entropy_of(d, logp, sum_others, moment_others):
    """H = −p log p + q (log s − t / s − log q), with p the label's probability and q = 1 − p."""
    logq = -softplus(-d)
    p = tl.exp(logp)
    q = tl.exp(logq)
    label_term = tl.where(p == 0.0, 0.0, -p * logp)
    entropy_others = tl.log(sum_others) - moment_others / sum_others
    others_term = tl.where(q == 0.0, 0.0, q * (entropy_others - logq))
    return label_term + others_term


def tile_width(V: int) -> int:
    """Logits in a tile: the whole row where it is short."""
    return min(int(triton.next_power_of_2(V)), MAX_BLOCK)


def tile_shape(V: int, *, narrow: bool = False) -> dict[str, int]:
    """DEPTH and LANES of a kernel that folds, and its warps.

    Measured on H200, on bfloat16 rows of 128,256: narrow programs, of which more are in work at
    once, read 9 % faster where a program folds one row and no entropy (4 % slower with one); two
    rows, or float32 slices, are read faster by wide ones.
    """
    depth, warps = (8, 2) if narrow else (4, 4)
    lanes = max(tile_width(V) // depth, 1)
    return {"DEPTH": tile_width(V) // lanes, "LANES": lanes, "num_warps": warps}
