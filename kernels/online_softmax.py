"""The online softmax that the kernels share: a row of logits, tile after tile, its label apart.

    z = x / T,    m = max z,    s = Σ exp(z − m),    t = Σ exp(z − m)(z − m)

m, s and t run over the logits other than the label's; a larger maximum rescales s and t. The label
joins last: with d = log s − (z_y − m) its log-prob is −softplus(d), which keeps its digits where
the probability is close to 1.
"""

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)
FLOOR = tl.constexpr(-1.0e4)  # exp(FLOOR) = 0, and unlike −inf it survives a product with 0
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
def load_others(row_ptr, column, stride_v, V, label, temperature):
    """z of these columns; −inf, which the fold skips, for the label and beyond the vocabulary."""
    inside = column < V
    x = tl.load(row_ptr + column.to(tl.int64) * stride_v, mask=inside, other=-float("inf"))
    return tl.where(column == label, -float("inf"), x.to(tl.float32) / temperature)


@triton.jit
def fold(max_others, sum_others, moment_others, z, WITH_MOMENT: tl.constexpr):
    """m, s and t after one more tile."""
    new_max = tl.maximum(max_others, tl.max(z, 0))
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # −inf − (−inf) is NaN
    decay = tl.where(max_others == -float("inf"), FLOOR, max_others - shift)
    shrink = tl.exp(decay)
    centred = floored(z - shift)
    exp = tl.exp(centred)
    if WITH_MOMENT:
        moment_others = shrink * (moment_others + decay * sum_others) + tl.sum(centred * exp, 0)
    return new_max, shrink * sum_others + tl.sum(exp, 0), moment_others


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
def grad_other(z, row_max, log_sum, entropy, grad_logp, grad_entropy, WITH_ENTROPY: tl.constexpr):
    """−(g + g_H (log p_j + H)) p_j: the gradient of a logit z_j other than the label's."""
    logp = floored(z - row_max - log_sum)
    pull = grad_logp
    if WITH_ENTROPY:
        pull += grad_entropy * (logp + entropy)
    return -pull * tl.exp(logp)


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
    """BLOCK of a kernel: the whole row where it is short."""
    return min(int(triton.next_power_of_2(V)), MAX_BLOCK)
