"""The branches of a batch of trunks: followed along the trunks, then grown in lock-step.

    slots   u o1 a1 o2 | x1 x2 | y1 y2 | …      x, y: first, second tokens of the branches at
    x2 sees u o1 a1 o2      x2                  steps 1 and 2 that are not the trunk's own;
    y1 sees u o1         x1      y1              a branch that ended asks no more

What is drawn stays on the model's device. Each token is one forward for all branches, and the host
reads one byte a branch: whether it continues.

Key: B trunks of a batch, N their branches, T their steps, R branches that grow together, C = B·Q
cells of a forward of Q new tokens a row, S slots, H hidden, P tokens of an action, K rows along the
trunks' actions, E end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.branch import Branch
from ..data.draws import next_uniforms, streams
from ..data.trunk import Trunk
from ..models import LMHead, ModuleHead
from ..ops import token_logprobs
from .decoding import SlotCache, check_finite, finite_rows, sample_tokens
from .replay import Replay, can_replay

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import LogitsProcessor, PreTrainedModel

# Logits that exist at once when tokens are sampled: 128 MiB for each of a few float64 arrays. On a
# GPU more, because each slice reads the whole head.
_LOGITS = 2**24
_LOGITS_CUDA = 2**26
# Cells of a forward below which its time is that of reading the weights: not worth another graph.
_FEW_CELLS = 64

# What becomes of a branch with a token.
_BROKEN, _ENDED, _GOES_ON, _FOLLOWS = -1, 0, 1, 2


@dataclass(frozen=True)
class Sampler:
    """From hidden rows to tokens and their log-probs."""

    head: LMHead | ModuleHead
    temperature: float
    truncations: Sequence[LogitsProcessor]
    ends: Sequence[int]
    seed: int

    @property
    def device(self) -> torch.device:
        return self.head.device

    def __call__(self, hidden_RH: Tensor, draws_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token of each row, its log-prob under the policy, and whether all is finite."""
        limit = _LOGITS_CUDA if hidden_RH.is_cuda else _LOGITS
        rows = max(1, limit // self.head.vocab_size)
        parts = zip(torch.split(hidden_RH, rows), torch.split(draws_R, rows), strict=True)
        tokens, logps, finite = zip(*(self._sample(*part) for part in parts), strict=True)
        return torch.cat(tokens), torch.cat(logps), torch.cat(finite)

    def _sample(self, hidden_RH: Tensor, draws_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.head.logits(hidden_RH)
        tokens = sample_tokens(logits, self.temperature, draws_R, self.truncations)
        logps = token_logprobs(logits, tokens, check_labels="off")
        return tokens, logps.float(), finite_rows(logits)


class Forest:
    """The branches of a batch of trunks; branch n grows at step ``step[n]`` of row ``row[n]``.

    As long as a branch writes what the trunk has at its place, it needs no forward of its own: the
    trunk's has been there. It leaves the trunk with its first other token.
    """

    def __init__(
        self,
        trunks: Sequence[Trunk],
        places: Sequence[int],
        samples: int,
        max_new_tokens: int,
        sampler: Sampler,
    ) -> None:
        steps = np.array([trunk.num_steps for trunk in trunks])
        spans = np.concatenate([trunk.action_spans for trunk in trunks])
        row_T = np.repeat(np.arange(len(trunks)), steps)
        self.row = np.repeat(row_T, samples)
        self.start = np.repeat(spans[:, 0], samples).astype(np.int64)
        self._trunks, self._steps, self._samples = trunks, steps, samples
        self._sampler, self._longest = sampler, max_new_tokens
        step = np.concatenate([np.repeat(np.arange(n), samples) for n in steps])
        sample = np.tile(np.arange(samples), int(steps.sum()))
        keys = streams(sampler.seed, np.asarray(places)[self.row], step, sample)
        # Where the trunks may be followed: rows K that predict an action's tokens and what is next.
        along_T = np.minimum(np.diff(spans)[:, 0], max_new_tokens - 1) + 1
        first_T = np.cumsum(along_T) - along_T
        self._row_K = np.repeat(row_T, along_T)
        self._column_K = np.arange(along_T.sum()) + np.repeat(spans[:, 0] - 1 - first_T, along_T)
        # Tokens of the trunk that a branch begins with.
        self.shared = np.zeros(len(self.row), np.int64)
        # On the device. A branch that has ended goes on writing behind its end, where nobody reads.
        step_N = np.repeat(np.arange(len(spans)), samples)
        depth_T = np.concatenate([t.position_ids[t.action_spans[:, 0]] for t in trunks])
        self._depth_N, self._streams_N, self._step_N, self._first_N = self.on_device(
            np.stack([depth_T[step_N], keys, step_N, first_T[step_N]])
        )
        self._own_TP = self.on_device(_padded(trunks, max_new_tokens))
        self._ends_E = self.on_device(np.array(sampler.ends))
        self._tokens_NP = self._depth_N.new_zeros((len(self.row), max_new_tokens + 1))
        self._logps_NP = torch.zeros_like(self._tokens_NP, dtype=torch.float32)
        self._lengths_N = torch.zeros_like(self._depth_N)

    def grow(self, model: PreTrainedModel, budget: int) -> None:
        """Read the trunks and follow them, then decode the branches that left them.

        As many of these at once as ``budget`` has room for.
        """
        budget //= len(self._trunks)
        width, per_branch = int(self._column_K.max()) + 1, self._longest - 1
        room = max(budget - width, budget // 2)
        together = max(1, room // per_branch) if per_branch else 1
        busiest = int(np.bincount(self.row).max())
        self.fixed = _in_fixed_shapes(model)
        slots = width + min(together, busiest) * per_branch
        # Attention kernels take a mask as it is if its rows are aligned.
        self.room = -(-slots // 16) * 16 if self.fixed else slots
        self.cache = SlotCache(model, len(self._trunks), self.room)
        left = self._follow(self._prefill(width, budget))
        places = _places(self.row[left])
        end = int(places.max(initial=-1)) + 1
        for first in range(0, end, together):
            self.cache.truncate(width)
            group = left[(first <= places) & (places < first + together)]
            _Group(self, group, last=first + together >= end).grow()

    def _prefill(self, width: int, chunk: int) -> Tensor:
        """Read the trunks; the hidden rows (K, H) along which they are followed.

        Only a lone trunk can be too long for one chunk, and its rows are in order of depth.
        """
        along = []
        for first in range(0, width, chunk):
            stop = min(width, first + chunk)
            column = self._column_K - first
            inside = np.flatnonzero((column >= 0) & (column < stop - first))
            hidden_BQH = self.cache.read_trunks(self._trunks, stop)
            rows_2k = self.on_device(np.stack([self._row_K[inside], column[inside]]))
            along.append(hidden_BQH[rows_2k[0], rows_2k[1]])
        return torch.cat(along)

    def seen_by(self, row_R: NDArray[np.int64], last_R: Tensor) -> Tensor:
        """(R, S) bool, which slots of the room these tokens of trunks see, and their own."""
        ends_BS = np.zeros((len(self._trunks), self.room), np.int64)
        for row_S, trunk in zip(ends_BS, self._trunks, strict=True):
            row_S[: len(trunk.subtree_end)] = trunk.subtree_end[: self.room]
        ends_RS = self.on_device(ends_BS)[self.on_device(row_R)]
        slot_S = torch.arange(self.room, device=last_R.device)
        return (slot_S <= last_R[:, None]) & (last_R[:, None] < ends_RS)

    def _follow(self, along_KH: Tensor) -> NDArray[np.int64]:
        """Sample along the trunks; the branches that left them and have not ended."""
        left = []
        n = np.arange(len(self.row))
        for position in range(self._longest):
            n_R = self.on_device(n)
            status_R = self.draw(n_R, along_KH[self._first_N[n_R] + position])
            same_R = self._tokens_NP[n_R, position] == self._own_TP[self._step_N[n_R], position]
            status = read(torch.where((status_R == _GOES_ON) & same_R, _FOLLOWS, status_R))
            n, parting = n[status == _FOLLOWS], n[status == _GOES_ON]
            self.shared[parting] = position
            left.append(parting)
            if not len(n):
                break
        return np.sort(np.concatenate(left))

    def draw(self, n_R: Tensor, hidden_RH: Tensor, live_R: Tensor | None = None) -> Tensor:
        """Draw and record the next token of the branches ``n``; int8, what becomes of each.

        Args:
            live_R: bool, those that have not ended before; None: all.
        """
        position_R = self._lengths_N[n_R]
        draws_R = next_uniforms(self._streams_N[n_R], position_R)
        tokens_R, logps_R, finite_R = self._sampler(hidden_RH, draws_R)
        going_R = (position_R + 1 < self._longest) & (tokens_R[:, None] != self._ends_E).all(dim=1)
        if live_R is not None:
            going_R, finite_R = going_R & live_R, finite_R | ~live_R
        self._tokens_NP[n_R, position_R] = tokens_R
        self._logps_NP[n_R, position_R] = logps_R
        self._lengths_N[n_R] = position_R + (1 if live_R is None else live_R)
        return torch.where(finite_R, going_R.to(torch.int8), _BROKEN)

    def newest(self, n_R: Tensor) -> tuple[Tensor, Tensor]:
        """The newest token of the branches ``n`` and its depth."""
        newest_R = self._lengths_N[n_R] - 1
        return self._tokens_NP[n_R, newest_R], self._depth_N[n_R] + newest_R

    def on_device(self, array: NDArray[np.integer]) -> Tensor:
        """A copy, int64."""
        tensor = torch.from_numpy(array.astype(np.int64))
        if self._sampler.device.type == "cuda":
            tensor = tensor.pin_memory()  # or the host would wait for the copy
        return tensor.to(self._sampler.device, non_blocking=True)

    def collect(self) -> list[list[list[Branch]]]:
        """``[trunk][step][sample]``."""
        tokens_NP = self._tokens_NP.int().cpu().numpy()
        columns = zip(
            tokens_NP, self._logps_NP.cpu().numpy(), self._lengths_N.tolist(), strict=True
        )
        flat = iter([Branch(tokens[:n].copy(), logps[:n].copy()) for tokens, logps, n in columns])
        return [[[next(flat) for _ in range(self._samples)] for _ in range(n)] for n in self._steps]


class _Group:
    """Branches that grow together: each has a cell (row, column) in the forwards.

    In fixed shapes a branch that has ended stays, unheard, until half of the cells are not needed;
    else it is dropped at once.
    """

    def __init__(self, forest: Forest, branches: NDArray[np.int64], last: bool) -> None:
        self._forest, self._cache, self._last = forest, forest.cache, last
        self._rows = np.arange(self._cache.rows)  # of the forest, that are still in the cache
        last_R = forest.on_device(forest.start[branches] + forest.shared[branches] - 1)
        self._slot = torch.full((), self._cache.slots, device=last_R.device)
        # What each branch sees of its row: the trunk until it left it, and its own slots.
        self._place(branches, forest.seen_by(forest.row[branches], last_R))

    def _place(self, branches: NDArray[np.int64], visible_RS: Tensor) -> None:
        """Give each of these branches a cell."""
        self._branches, self._visible_RS = branches, visible_RS
        column = _places(self._forest.row[branches])
        self._columns = int(column.max(initial=-1)) + 1
        cell = np.searchsorted(self._rows, self._forest.row[branches]) * self._columns + column
        self._branch_R, self._cell_R, self._column_R = self._forest.on_device(
            np.stack([branches, cell, column])
        )
        self._live_R = torch.ones_like(self._branch_R, dtype=torch.bool)
        self._replay = Replay(self._live_R.device)

    def grow(self) -> None:
        """Decode, a token of each per turn, until each has ended."""
        while len(self._branches):
            status_R = self._replay(self._step) if self._forest.fixed else self._step()
            going = np.flatnonzero(read(status_R) == _GOES_ON)
            if len(going) == 0 or self._worth_dropping(going):
                self._keep(going)

    def _worth_dropping(self, going: NDArray[np.int64]) -> bool:
        """Whether the branches that have ended are worth a new shape."""
        if not self._forest.fixed:
            return len(going) < len(self._branches)
        needed = self._forest.row[self._branches[going]]
        columns, rows = int(_places(needed).max()) + 1, len(np.unique(needed))
        cells = columns * (rows if self._may_drop(rows) else len(self._rows))
        return 2 * cells <= len(self._rows) * self._columns and self._cells > _FEW_CELLS

    def _keep(self, going: NDArray[np.int64]) -> None:
        branches = self._branches[going]
        rows = np.unique(self._forest.row[branches])
        if self._may_drop(len(rows)):
            kept = np.searchsorted(self._rows, rows)
            self._cache.keep_rows(self._forest.on_device(kept))
            self._rows = rows
        self._place(branches, self._visible_RS[self._forest.on_device(going)])

    def _may_drop(self, rows: int) -> bool:
        """Rows of the cache: a copy of the others, worth it for half of them."""
        return self._last and 0 < 2 * rows <= len(self._rows)

    @property
    def _cells(self) -> int:
        return len(self._rows) * self._columns

    def _step(self) -> Tensor:
        """Encode the newest token of each branch and draw the next; what becomes of each."""
        hidden_BQH = self._encode(*self._forest.newest(self._branch_R))
        hidden_RH = hidden_BQH.flatten(0, 1)[self._cell_R]
        status_R = self._forest.draw(self._branch_R, hidden_RH, self._live_R)
        self._live_R.copy_(status_R == _GOES_ON)
        self._slot += self._columns
        return status_R

    def _encode(self, tokens_R: Tensor, depths_R: Tensor) -> Tensor:
        fixed, shape = self._forest.fixed, (len(self._rows), self._columns)
        slots = self._forest.room if fixed else self._cache.slots + self._columns
        self._visible_RS.scatter_(1, (self._slot + self._column_R)[:, None], value=True)
        visible_CS = self._visible_RS.new_zeros((self._cells, slots))
        visible_CS[:, 0] = True  # for filler tokens: attention over nothing would be NaN
        visible_CS[self._cell_R] = self._visible_RS[:, :slots]
        tokens_BQ, depths_BQ = (
            new_R.new_zeros(self._cells).index_put_((self._cell_R,), new_R).view(shape)
            for new_R in (tokens_R, depths_R)
        )
        visible_BQS = visible_CS.view(*shape, slots)
        if not fixed:
            return self._cache.extend(tokens_BQ, depths_BQ, visible_BQS)
        slots_Q = self._slot + torch.arange(self._columns, device=self._slot.device)
        return self._cache.write(tokens_BQ, depths_BQ, visible_BQS, slots_Q)


def read(status_R: Tensor) -> NDArray[np.int8]:
    """The one thing that the host asks for a token.

    Raises:
        FloatingPointError: where the logits of a branch were not finite.
    """
    status: NDArray[np.int8] = status_R.cpu().numpy()
    check_finite(not (status == _BROKEN).any())
    return status


def _in_fixed_shapes(model: PreTrainedModel) -> bool:
    """On a GPU, where the forward can then be replayed; else they cost and give nothing."""
    return can_replay(model)


def _padded(trunks: Sequence[Trunk], width: int) -> NDArray[np.int64]:
    """(T, width) the tokens of each step's action, -1 after them."""
    padded = np.full((sum(trunk.num_steps for trunk in trunks), width), -1, np.int64)
    steps = ((trunk, span) for trunk in trunks for span in trunk.action_spans)
    for row, (trunk, (start, stop)) in zip(padded, steps, strict=True):
        action = trunk.input_ids[start : min(stop, start + width)]
        row[: len(action)] = action
    return padded


def _places(rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each branch among those of its row; branches of a row are neighbours."""
    return np.arange(len(rows_N)) - np.searchsorted(rows_N, rows_N)
