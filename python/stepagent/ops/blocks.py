"""Blocks of logits into log-probs, entropies and gradients: the maths that the operators share.

    z = x / T,    log p_y = z_y − log Σ_j exp z_j,    H = −Σ_j p_j log p_j

Logits live only in a bounded workspace: a slice of the vocabulary at a time for `linear_logprobs`,
a few rows at a time for `token_logprobs`. A fold keeps, of the logits other than the label's, the
maximum, Σ exp and Σ exp · z, in a fixed order. The label joins last, as
log p_y = −softplus(log Σ_{j≠y} exp z_j − z_y), which keeps its digits where p_y is close to 1.
The backward computes the logits again.

Dimensions: N scored tokens, V vocabulary; n tokens with a valid label, w vocabulary entries in a
slice.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepagent.checks import IGNORE

# One block of logits, or of weights in the dtype of the computation. On CPU it should stay in the
# caches; on a GPU a narrow product wastes the machine.
WORKSPACE_BYTES = 16 * 2**20
GPU_WORKSPACE_BYTES = 2**30
KEPT_SHARE = 4  # of a GPU's free memory, a quarter may hold logits for the backward
FLOOR = -1e4  # exp(FLOOR) = 0 in float64 too, and unlike −inf it survives a product with 0


def workspace_bytes(device: torch.device) -> int:
    return WORKSPACE_BYTES if device.type == "cpu" else GPU_WORKSPACE_BYTES


def spare_bytes(device: torch.device) -> int:
    """What logits may take that are kept unasked: on a GPU, a share of what is free."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + cached) // KEPT_SHARE


# logps_N, entropy_N (0 unless asked for), and for the backward max_N and log_sum_N: max_j z_j and
# log Σ_j exp(z_j − max). Their sum alone would lose the digits that a large maximum takes.
Results = tuple[Tensor, Tensor, Tensor, Tensor]
RESULTS = ("logps_N", "entropy_N", "max_N", "log_sum_N")


class Fold:
    """Blocks of logits z, one after the other, into log-prob and entropy of the label.

    Keeps max, Σ exp(z − max) and Σ exp(z − max)(z − max) over every logit but the label's. The
    maximum starts from −inf, so that logits of any size work.
    """

    def __init__(self, labels_n: Tensor, dtype: torch.dtype, with_entropy: bool) -> None:
        self.labels_n = labels_n
        self.with_entropy = with_entropy
        self.max_n = torch.full_like(labels_n, -math.inf, dtype=dtype)
        self.sum_n = torch.zeros_like(self.max_n)
        self.moment_n = torch.zeros_like(self.max_n)
        self.label_n = torch.full_like(self.max_n, math.nan)  # stays NaN for a label no block holds
        self.shrink_n = torch.ones_like(self.max_n)  # the last block's effect on the sums before it

    def update(self, z_nw: Tensor, start: int, out_nw: Tensor) -> Tensor:
        """Fold the logits of vocabulary entries start, start + 1, ….

        Returns exp(z − max) of them, 0 for the label; overwrites `out_nw`, which may be `z_nw`.
        """
        column_n1, inside_n1 = _label_column(self.labels_n, start, z_nw.shape[1])
        value_n1 = z_nw.gather(1, column_n1)
        self.label_n = torch.where(inside_n1, value_n1, self.label_n[:, None]).squeeze(1)
        z_nw.scatter_(1, column_n1, value_n1.masked_fill(inside_n1, -math.inf))
        torch.sub(z_nw, self._raise_maximum(z_nw.amax(1))[:, None], out=out_nw)
        if out_nw is not z_nw:
            z_nw.scatter_(1, column_n1, value_n1)
        if self.with_entropy:
            exp_nw = out_nw.clamp_(min=FLOOR).exp()
            self.moment_n += out_nw.mul_(exp_nw).sum(1)
        else:
            exp_nw = out_nw.exp_()
        self.sum_n += exp_nw.sum(1)
        return exp_nw

    def absorb(self, max_n: Tensor, sum_n: Tensor, moment_n: Tensor) -> None:
        """Fold what another fold has summed, over other logits of the same tokens."""
        rise_n = (max_n - self._raise_maximum(max_n)).clamp_(min=FLOOR)
        grow_n = rise_n.exp()
        self.moment_n += grow_n * (moment_n + rise_n * sum_n)
        self.sum_n += grow_n * sum_n

    def _raise_maximum(self, max_n: Tensor) -> Tensor:
        """Let the maximum be at least this. Returns it, 0 for −inf: −inf − (−inf) is NaN."""
        max_n = torch.maximum(self.max_n, max_n)
        shift_n = max_n.masked_fill(max_n == -math.inf, 0.0)
        decay_n = (self.max_n - shift_n).clamp_(min=FLOOR)
        self.shrink_n = decay_n.exp()
        self.moment_n = self.shrink_n * (self.moment_n + decay_n * self.sum_n)
        self.sum_n = self.shrink_n * self.sum_n
        self.max_n = max_n
        return shift_n

    def finish(self) -> Results:
        """0 for masked labels; NaN for one that no block held."""
        # With a label of +inf the limit log p = 0 would hide the overflow that made it.
        label_n = self.label_n.masked_fill(self.label_n == math.inf, math.nan)
        log_sum_others_n = self.sum_n.log()
        margin_n = label_n - self.max_n - log_sum_others_n
        logps_n = F.logsigmoid(margin_n)  # log σ(x) = −softplus(−x), without its threshold
        entropy_n = self._entropy(logps_n, margin_n, log_sum_others_n)
        max_n = torch.maximum(self.max_n, label_n)
        others_n = self.max_n - max_n + log_sum_others_n
        log_sum_n = torch.logaddexp(others_n, label_n - max_n)
        ignored_n = self.labels_n == IGNORE
        a, b, c, d = (
            result_n.masked_fill(ignored_n, 0.0)
            for result_n in (logps_n, entropy_n, max_n, log_sum_n)
        )
        return a, b, c, d

    def _entropy(self, logps_n: Tensor, margin_n: Tensor, log_sum_others_n: Tensor) -> Tensor:
        """H = −p log p − q log q + q H_others, with p the label's probability and q = 1 − p."""
        if not self.with_entropy:
            return torch.zeros_like(logps_n)
        p_n, q_n = logps_n.exp(), -torch.expm1(logps_n)
        entropy_others_n = log_sum_others_n - self.moment_n / self.sum_n
        label_term_n = (-p_n * logps_n).masked_fill(p_n == 0, 0.0)
        others_term_n = q_n * (entropy_others_n - F.logsigmoid(-margin_n))
        return label_term_n + others_term_n.masked_fill(q_n == 0, 0.0)


@dataclass(frozen=True)
class Upstream:
    """What the backward of n tokens needs: results of the forward, and their gradients over T."""

    labels_n: Tensor
    logps_n: Tensor
    entropy_n: Tensor
    max_n: Tensor
    log_sum_n: Tensor
    grad_logps_n: Tensor
    grad_entropy_n: Tensor | None

    def grad_logits(self, z_nw: Tensor, start: int, out_nw: Tensor) -> Tensor:
        """∂/∂x_j = (g (1[j = y] − p_j) − g_H p_j (log p_j + H)) / T, z = x / T, into `out_nw`.

        The label's column is −expm1(log p_y) g: near 1 a rounded p_y leaves 1 − p_y no digits.
        """
        column_n1, inside_n1 = _label_column(self.labels_n, start, z_nw.shape[1])
        torch.sub(z_nw, self.max_n[:, None], out=out_nw)
        label_n = -torch.expm1(self.logps_n) * self.grad_logps_n
        if self.grad_entropy_n is None:
            grad_nw = out_nw.exp_().mul_((-self.grad_logps_n * torch.exp(-self.log_sum_n))[:, None])
        else:
            logp_nw = out_nw.sub_(self.log_sum_n[:, None]).clamp_(min=FLOOR)
            p_nw = logp_nw.exp()
            grad_nw = logp_nw.add_(self.entropy_n[:, None]).mul_(self.grad_entropy_n[:, None])
            grad_nw.add_(self.grad_logps_n[:, None]).mul_(p_nw).neg_()
            surprise_n = self.logps_n.clamp(min=FLOOR) + self.entropy_n
            label_n -= self.grad_entropy_n * self.logps_n.exp() * surprise_n
        value_n1 = torch.where(inside_n1, label_n[:, None], grad_nw.gather(1, column_n1))
        return grad_nw.scatter_(1, column_n1, value_n1)


def _label_column(labels_n: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each label in the block that begins at `start`, and whether it is in there."""
    local_n1 = (labels_n - start)[:, None]
    column_n1 = local_n1.clamp(0, width - 1)
    return column_n1, column_n1 == local_n1


def scored(labels_N: Tensor) -> Tensor:
    """Positions of the labels that score. To count them stalls a CUDA stream."""
    return (labels_N != IGNORE).nonzero().squeeze(1)


def per_token(temperature: Tensor, tokens_n: Tensor | None) -> Tensor:
    """() or (n, 1); None: all tokens."""
    if not temperature.ndim:
        return temperature
    return temperature[:, None] if tokens_n is None else temperature[tokens_n, None]


def divide(z: Tensor, temperature: Tensor, out: Tensor) -> Tensor:
    """z / T; `z` itself for T = 1 on CPU, where a look at T costs nothing, else in `out`."""
    if temperature.ndim == 0 and temperature.device.type == "cpu" and temperature.item() == 1:
        return z
    return torch.div(z, temperature, out=out)


def upstream_of(
    tokens_n: Tensor | None,
    labels_n: Tensor,
    temperature: Tensor,
    results: list[Tensor],
    grad_logps_N: Tensor,
    grad_entropy_N: Tensor | None,
) -> Upstream:
    """What the backward to z · T needs of these tokens; temperature () or (n, 1).

    A masked label's row gives 0 whatever it and its upstream gradients hold. tokens_n None: all.
    """
    ignored_n = labels_n == IGNORE

    def of_tokens(values_N: Tensor) -> Tensor:
        return values_N if tokens_n is None else values_N[tokens_n]

    logps_n, entropy_n, max_n, log_sum_n = map(of_tokens, results)

    def scaled(grad_N: Tensor) -> Tensor:
        grad_n1 = of_tokens(grad_N).masked_fill(ignored_n, 0.0)[:, None]
        return divide(grad_n1, temperature, grad_n1).squeeze(1)

    return Upstream(
        labels_n,
        logps_n,
        entropy_n,
        max_n.masked_fill(ignored_n, math.inf),
        log_sum_n,
        scaled(grad_logps_N),
        None if grad_entropy_N is None else scaled(grad_entropy_N),
    )


def like_results(labels_N: Tensor, dtype: torch.dtype) -> Results:
    """Their shapes, for the compiler."""
    a, b, c, d = (torch.empty_like(labels_N, dtype=dtype) for _ in range(4))
    return a, b, c, d


def spread(results_n: Results, tokens_n: Tensor | None, N: int) -> Results:
    """Results of the scored tokens at their positions among all N, 0 elsewhere; None: of all."""
    if tokens_n is None:
        return results_n
    a, b, c, d = (r_n.new_zeros(N).index_copy_(0, tokens_n, r_n) for r_n in results_n)
    return a, b, c, d


def sum_rows(values_nK: Tensor, row_n: Tensor, U: int) -> Tensor:
    """(U, K): each row the sum of the values that name it, added in a fixed order."""
    sums_UK = values_nK.new_zeros(U, values_nK.shape[1])
    if values_nK.device.type == "cpu":
        return sums_UK.index_add_(0, row_n, values_nK)  # in CUDA by atomics
    return sums_UK.index_put_((row_n,), values_nK, accumulate=True)  # on CPU by racing threads
