"""A language-model head on the rows that scored tokens need: its products, slice by slice.

Dimensions: N scored tokens, R hidden rows, H hidden size, V vocabulary; n tokens that take part, U
hidden rows for them, w vocabulary entries in a slice.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepagent.checks import IGNORE
from stepagent.ops import blocks, paths
from stepagent.ops.blocks import per_token, scored, sum_rows

MIN_SLICE = 256  # vocabulary entries, of which a slice is a multiple
GPU_MIN_SLICE = 8192  # narrower ones read and write ∂h too often
UNASKED = -1  # of keep_bytes: as many logits as a GPU has room for
WEIGHED = 16384  # widest slice of a frozen head on a GPU: one program holds a row in registers
GPU_CHUNK = 8192  # tokens; more make slices so narrow that a frozen head's ∂h is rescaled too often


@dataclass(frozen=True)
class Tokens:
    """The n tokens that take part, and the U hidden rows that predict them."""

    positions_n: Tensor | None  # among the N; None: all of them
    labels_n: Tensor  # contiguous
    temperature: Tensor  # () or (n, 1)
    rows_U: Tensor  # among the R
    row_n: Tensor | None  # each token's row among the U; None where n = U, in order
    hidden_UH: Tensor  # in the dtype of the products
    kept_nK: Tensor | None = None  # ids that each may draw, others than [0, V) for none; None: all

    def chunks(self) -> Iterator["Tokens"]:
        """On a GPU a bounded number at a time, each with a row of its own; on CPU all at once."""
        n = len(self.labels_n)
        size = GPU_CHUNK if paths.on_gpu(self.hidden_UH) and self.row_n is None else n
        for start in range(0, n, size) if n > size else (0,):
            part = slice(start, start + size)
            yield replace(
                self,
                positions_n=None if self.positions_n is None else self.positions_n[part],
                labels_n=self.labels_n[part],
                temperature=self.temperature[part] if self.temperature.ndim else self.temperature,
                rows_U=self.rows_U[part] if n > size else self.rows_U,
                hidden_UH=self.hidden_UH[part] if n > size else self.hidden_UH,
                kept_nK=None if self.kept_nK is None else self.kept_nK[part],
            )

    def logits_of(self, x_Uw: Tensor) -> Tensor:
        """A row of logits for each token; `x_Uw` itself where no row is shared."""
        return x_Uw if self.row_n is None else x_Uw[self.row_n]

    def restricted(self, x_nw: Tensor, part: slice, out_nw: Tensor) -> Tensor:
        """−inf for what a token may not draw, in `out_nw`; `x_nw` itself where all may draw all."""
        if self.kept_nK is None:
            return x_nw
        n, w = x_nw.shape
        column_nK = self.kept_nK - part.start
        outside_nK = (column_nK < 0) | (column_nK >= w)
        barred_nw = torch.ones(n, w + 1, dtype=torch.bool, device=x_nw.device)
        barred_nw.scatter_(1, column_nK.masked_fill_(outside_nK, w), False)
        return out_nw.copy_(x_nw).masked_fill_(barred_nw[:, :w], -math.inf)

    def rows_of(self, grad_nK: Tensor) -> Tensor:
        """Sums over the tokens of each row; `grad_nK` itself where no row is shared."""
        if self.row_n is None:
            return grad_nK
        return sum_rows(grad_nK, self.row_n, self.hidden_UH.shape[0])


def select(
    hidden_RH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor | None,
    temperature: Tensor,
    kept_NK: Tensor | None = None,
) -> Tokens:
    hidden_dtype = paths.factor_dtype(hidden_RH, temperature.dtype)
    if rows_N is not None and paths.on_gpu(hidden_RH):
        return _all_tokens(hidden_RH, labels_N, rows_N, temperature, kept_NK, hidden_dtype)
    positions_n = scored(labels_N)
    rows_U, row_n = positions_n, None
    if rows_N is not None:
        rows_n = rows_N[positions_n]
        rows_U, row_n = torch.unique(rows_n, return_inverse=True)
        if len(rows_U) == len(rows_n):
            rows_U, row_n = rows_n, None
    return Tokens(
        positions_n,
        labels_N[positions_n],
        per_token(temperature, positions_n),
        rows_U,
        row_n,
        hidden_RH[rows_U].to(hidden_dtype),
        None if kept_NK is None else kept_NK[positions_n],
    )


def _all_tokens(
    hidden_RH: Tensor,
    labels_N: Tensor,
    rows_N: Tensor,
    temperature: Tensor,
    kept_NK: Tensor | None,
    hidden_dtype: torch.dtype,
) -> Tokens:
    """Masked ones too, whose rows count as zeros: whatever they hold would spread in products."""
    ignored_N1 = (labels_N == IGNORE)[:, None]
    return Tokens(
        None,
        labels_N.contiguous(),  # as the kernels read it
        per_token(temperature, None),
        rows_N,
        None,
        hidden_RH[rows_N].masked_fill(ignored_N1, 0.0).to(hidden_dtype),
        kept_NK,
    )


@dataclass(frozen=True)
class Head:
    """The language-model head, or a shard of it; a slice of its vocabulary at a time."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    dtype: torch.dtype  # of the logits

    @property
    def triton(self) -> bool:
        return paths.runs_triton(self.weight_VH)

    def slices(self, tokens: Tokens, widest: int | None = None) -> list[slice]:
        """Of at most `widest`, so narrow that logits and upcast weights fit the workspace."""
        V, H = self.weight_VH.shape
        longest = max(len(tokens.labels_n), H, 1)
        room = blocks.workspace_bytes(self.weight_VH.device) // (self.dtype.itemsize * longest)
        if not paths.on_gpu(tokens.hidden_UH):
            return _slices(V, max(room // MIN_SLICE, 1) * MIN_SLICE)
        width = max(room // MIN_SLICE * MIN_SLICE, GPU_MIN_SLICE)
        # Products whose sizes are no multiple of 8 are several times slower: the rest goes alone.
        even = V // 8 * 8
        rest = [slice(even, V)] if even < V else []
        return _slices(even, min(width, widest or width)) + rest

    def weight_wH(self, part: slice, tokens: Tokens) -> Tensor:
        return self.weight_VH[part].to(tokens.hidden_UH.dtype)

    def bias_w(self, part: slice) -> Tensor | None:
        """Contiguous, as the kernels read it."""
        return None if self.bias_V is None else self.bias_V[part].contiguous()

    def capped(self, x_Uw: Tensor, part: slice, out_Uw: Tensor) -> Tensor:
        """Bias and softcap; `x_Uw` itself where there is neither, else in `out_Uw`."""
        if self.bias_V is not None:
            x_Uw = torch.add(x_Uw, self.bias_V[part], out=out_Uw)
        if self.softcap is not None:
            x_Uw = torch.div(x_Uw, self.softcap, out=out_Uw).tanh_().mul_(self.softcap)
        return x_Uw

    def slope(self, capped: Tensor) -> Tensor | None:
        """Derivative of the softcap, 1 − tanh²."""
        return None if self.softcap is None else 1 - (capped / self.softcap).square_()


def _slices(V: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, V)) for start in range(0, V, width)]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a · b, rounded to the dtype of `out` only."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a · b, rounded to the dtype of `sums` only."""
    if a.dtype == sums.dtype:
        torch.addmm(sums, a, b, out=sums)
    else:
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)


class Products:
    """h · wᵀ slice by slice: in one workspace, or where the forward keeps them for the backward."""

    def __init__(
        self,
        tokens: Tokens,
        head: Head,
        kept: Tensor,
        compute: bool,
        widest: int | None = None,
    ) -> None:
        self.tokens, self.head, self.kept, self.compute = tokens, head, kept, compute
        self.U = tokens.hidden_UH.shape[0]
        self.parts = head.slices(tokens, widest)
        largest = self.U * padded(self.parts[0].stop, tokens)
        self.workspace = torch.empty(largest, dtype=head.dtype, device=tokens.hidden_UH.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Each slice, its weights, its product, and room of that shape: the product's own, or,
        where the product is kept, other room."""
        for part in self.parts:
            weight_wH, w = self.head.weight_wH(part, self.tokens), part.stop - part.start
            room_Uw = self._rows(self.workspace, w)
            stop = self.U * padded(part.stop, self.tokens)
            keeps = stop <= len(self.kept)
            x_Uw = self._rows(self.kept[self.U * part.start : stop], w) if keeps else room_Uw
            if self.compute or not keeps:
                product(self.tokens.hidden_UH, weight_wH.T, x_Uw)
            yield part, weight_wH, x_Uw, room_Uw

    def _rows(self, memory: Tensor, w: int) -> Tensor:
        stride = padded(w, self.tokens)
        return memory[: self.U * stride].view(self.U, stride)[:, :w]


def padded(w: int, tokens: Tokens) -> int:
    """So long is a row of w logits: a GPU's products want rows that begin at 16 bytes."""
    return -(-w // 8) * 8 if paths.on_gpu(tokens.hidden_UH) else w


def room_for_logits(tokens: Tokens, head: Head, keep_bytes: int) -> Tensor:
    """For the products of the first slices, as many as fit; `UNASKED`: all of them or none."""
    U = tokens.hidden_UH.shape[0]
    sizes = [U * padded(p.stop, tokens) * head.dtype.itemsize for p in head.slices(tokens)]
    if keep_bytes == UNASKED:
        spare = blocks.spare_bytes(tokens.hidden_UH.device)
        keep_bytes = sizes[-1] if sizes[-1] <= spare else 0
    largest = max((size for size in sizes if size <= keep_bytes), default=0)
    entries = largest // head.dtype.itemsize
    return torch.empty(entries, dtype=head.dtype, device=tokens.hidden_UH.device)


def write_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a · b, rounded to the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither the caller's autocast nor TF32 (on CPU bfloat16) rounds the products inside.

    The setting is the backend's own: the one for all of torch cannot be read where a caller has
    used torch's newer names for it, such as transformers does for ``tf32=True``.
    """
    matmul = (torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda).matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = "none"  # follows the setting for all of torch
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before
