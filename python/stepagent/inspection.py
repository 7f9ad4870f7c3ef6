"""Inspection: at every step of a trajectory, what would the agent have done?

StepAgent (arXiv 2411.03817), section "Inspection": the agent acts at each state of the expert's
trajectory. Branch decoding: one prefill of the trunk gives the state at all T steps, and what comes
after every token of the trunk's own actions. As long as the agent samples just these, it follows
the trunk; from where it parts, the branches of all steps grow in lock-step, each seeing its own
prefix of the trunk and itself.

    slots   u o1 a1 o2 | x1 x2 | y1 y2 | …      x, y: first, second tokens of the branches at
    x2 sees u o1 a1 o2      x2                  steps 1 and 2 that are not the trunk's own;
    y1 sees u o1         x1      y1              a branch that ended asks no more

Key: B trunks of a batch, N their branches, G branches that grow together, W slots of a trunk,
S slots, Q new tokens of a row, H hidden, P tokens of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .decoding import (
    SlotCache,
    check_count,
    check_temperature,
    make_truncations,
    sample_tokens,
    uniforms,
)
from .encoding import Trunk
from .models import LMHead, check_fits, check_tree_support, evaluation_mode, lm_head
from .ops import token_logprobs

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import LogitsProcessor, PreTrainedModel

    from .engines import Engine

# Logits that exist at once when tokens are sampled: 128 MiB for each of a few float64 arrays.
_LOGITS = 2**24


@dataclass(frozen=True, eq=False)
class Branch:
    """One action tried at a state: its tokens, int32, the end token included where it was produced,
    and the policy's log-prob of each (fp32, at temperature 1 whatever the sampling temperature)."""

    token_ids: NDArray[np.int32]
    logps: NDArray[np.float32]


@torch.no_grad()
def inspect(
    model: PreTrainedModel | Engine,
    trunks: Sequence[Trunk],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    first_trunk: int = 0,
    places: Sequence[int] | None = None,
    max_batch_tokens: int = 8192,
    progress: bool = False,
) -> list[list[list[Branch]]]:
    """The agent's actions at every state of ``trunks``: ``branches[i][t][k]``.

    :param model: a model, or an engine of :mod:`stepagent.engines`, which does the same elsewhere.
    :param samples: actions per state. At ``temperature=0`` they are all the greedy one.
    :param max_new_tokens: an action longer than this is cut, without an end token.
    :param top_k: sample among the ``top_k`` likeliest tokens only; ``top_p``: among the fewest of
        this probability together; ``min_p``: among those of this share of the likeliest's
        probability. transformers' own, after the temperature and in this order, as in ``generate``.
    :param eos_token_id: what ends an action; None: as ``model.generation_config`` says.
    :param seed: the tokens of (trunk, step, sample) depend on it, on the trunk's place in
        ``trunks``, and on nothing else in the batch beyond rounding.
    :param first_trunk: the place of ``trunks[0]``, where ``trunks`` are a part of more.
    :param places: the place of each trunk, where the part is not one that follows on.
    :param max_batch_tokens: bounds the slots (trunks × tokens) of one batch and the tokens of one
        forward. A trunk that needs more is read in chunks, and its branches grow in turns: it takes
        at most its own length and half of this, or one branch.
    :raises ValueError: for an option out of range, no end token, or a model that a tree would
        make wrong (:func:`stepagent.models.check_tree_support`).
    :raises FloatingPointError: when the model's logits are not finite.
    """
    if places is None:
        places = range(first_trunk, first_trunk + len(trunks))
    if len(places) != len(trunks):
        raise ValueError(f"places has {len(places)} entries for {len(trunks)} trunks")
    if not isinstance(model, nn.Module):
        for name, value in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
            if value is not None:
                raise ValueError(f"{name} is {value}, but an engine samples from all tokens")
        return model.inspect(
            trunks,
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=eos_token_id,
            seed=seed,
            places=places,
            progress=progress,
        )
    check_count("samples", samples)
    check_count("max_new_tokens", max_new_tokens)
    check_count("max_batch_tokens", max_batch_tokens)
    check_temperature(temperature)
    truncations = make_truncations(top_k, top_p, min_p)
    ends = end_tokens(model, eos_token_id)
    check_tree_support(model)
    for i, trunk in enumerate(trunks):
        deepest = max(len(trunk.input_ids), int(trunk.action_spans[-1, 0]) + max_new_tokens)
        what = f"trunks[{i}] with max_new_tokens={max_new_tokens}"
        check_fits(model, what, trunk.input_ids, deepest)
    sampler = _Sampler(lm_head(model), temperature, truncations, seed)
    branches: list[list[list[Branch]]] = [[] for _ in trunks]
    bar = tqdm(total=len(trunks), desc="inspect", disable=not progress)
    with evaluation_mode(model), bar:
        for batch in _batches(trunks, samples * (max_new_tokens - 1), max_batch_tokens):
            chosen, where = [trunks[i] for i in batch], [places[i] for i in batch]
            forest = _Forest(chosen, where, samples, max_new_tokens)
            forest.grow(model, sampler, ends, max_batch_tokens)
            for i, steps in zip(batch, forest.collect(), strict=True):
                branches[i] = steps
            bar.update(len(batch))
    return branches


def end_tokens(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The ids that end an action; an error when neither the caller nor the model names one."""
    if eos_token_id is None:
        generation_config = getattr(model, "generation_config", None)
        eos_token_id = getattr(generation_config, "eos_token_id", None)
    ends = [] if eos_token_id is None else [int(token) for token in np.atleast_1d(eos_token_id)]
    if not ends:
        raise ValueError(
            "no token ends an action: eos_token_id is not given and model.generation_config has "
            "none; pass the id of the end-of-turn token"
        )
    return ends


def _batches(trunks: Sequence[Trunk], per_step: int, budget: int) -> list[list[int]]:
    """Indices of trunks, of similar length together, whose padded slots stay under ``budget``."""
    slots = [int(t.action_spans[-1, 1]) + t.num_steps * per_step for t in trunks]
    batches: list[list[int]] = []
    for i in sorted(range(len(trunks)), key=slots.__getitem__):
        if batches and (len(batches[-1]) + 1) * slots[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass(frozen=True)
class _Sampler:
    """From hidden rows to tokens and their log-probs."""

    head: LMHead
    temperature: float
    truncations: list[LogitsProcessor]
    seed: int

    def __call__(
        self, hidden_RH: Tensor, *keys_R: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The next token of each row, drawn by its keys, and its log-prob under the policy."""
        draws_R = uniforms(self.seed, *keys_R)
        rows = max(1, _LOGITS // self.head.weight_VH.shape[0])
        slices = [slice(a, a + rows) for a in range(0, len(draws_R), rows)]
        tokens, logps = zip(*(self._sample(hidden_RH[s], draws_R[s]) for s in slices), strict=True)
        return torch.cat(tokens).cpu().numpy(), torch.cat(logps).float().cpu().numpy()

    def _sample(self, hidden_RH: Tensor, draws_R: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        logits = self.head.logits(hidden_RH)
        tokens = sample_tokens(logits, self.temperature, draws_R, self.truncations)
        return tokens, token_logprobs(logits, tokens)


class _Forest:
    """The branches of a batch of trunks; branch n grows at step ``step[n]`` of row ``row[n]``.

    As long as a branch writes what the trunk has at its place, it needs no forward of its own: the
    trunk's has been there. It leaves the trunk with its first other token.
    """

    def __init__(
        self, trunks: Sequence[Trunk], places: Sequence[int], samples: int, max_new_tokens: int
    ) -> None:
        steps = np.array([trunk.num_steps for trunk in trunks])
        spans = np.concatenate([trunk.action_spans for trunk in trunks])
        row_T = np.repeat(np.arange(len(trunks)), steps)
        self.row = np.repeat(row_T, samples)
        self.step = np.concatenate([np.repeat(np.arange(n), samples) for n in steps])
        self.sample = np.tile(np.arange(samples), int(steps.sum()))
        self.start = np.repeat(spans[:, 0], samples).astype(np.int64)
        self._trunks, self._steps, self._samples = trunks, steps, samples
        self._keys = np.asarray(places)[self.row], self.step, self.sample
        shape = len(self.row), max_new_tokens
        self._tokens_NP, self._logps_NP = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self._lengths_N = np.zeros(len(self.row), np.int64)
        # Where the trunks may be followed: rows K that predict an action's tokens and what is next.
        along_T = np.minimum(np.diff(spans)[:, 0], max_new_tokens - 1) + 1
        first_T = np.cumsum(along_T) - along_T
        self._row_K = np.repeat(row_T, along_T)
        self._column_K = np.arange(along_T.sum()) + np.repeat(spans[:, 0] - 1 - first_T, along_T)
        self._first_N = np.repeat(first_T, samples)
        self._shared_N = np.zeros(
            len(self.row), np.int64
        )  # tokens of the trunk a branch begins with
        self._own_NP = _padded(trunks, max_new_tokens)[np.repeat(np.arange(len(spans)), samples)]

    def grow(
        self, model: PreTrainedModel, sampler: _Sampler, ends: Sequence[int], budget: int
    ) -> None:
        """Read the trunks and follow them, then decode the branches that left them.

        As many of these at once as ``budget`` has room for.
        """
        self._device = sampler.head.weight_VH.device
        budget //= len(self._trunks)
        width, per_branch = int(self._column_K.max()) + 1, self._tokens_NP.shape[1] - 1
        room = max(budget - width, budget // 2)
        together = max(1, room // per_branch) if per_branch else 1
        busiest = int(np.bincount(self.row).max())
        self._room = width + min(together, busiest) * per_branch
        self._cache = SlotCache(model, len(self._trunks), self._room)
        left = self._follow(self._prefill(width, budget), sampler, ends)
        places = _places(self.row[left])
        for first in range(0, int(places.max(initial=-1)) + 1, together):
            self._cache.truncate(width)
            self._grow(left[(first <= places) & (places < first + together)], sampler, ends)

    def _prefill(self, width: int, chunk: int) -> Tensor:
        """Read the trunks; the hidden rows (K, H) along which they are followed.

        Only a lone trunk can be too long for one chunk, and its rows are in order of depth.
        """
        # A padding token lies behind all tokens of its row: causal attention hides it from them.
        ids = [trunk.input_ids[:width] for trunk in self._trunks]
        tokens_BW = self._on_device(np.stack([np.pad(t, (0, width - len(t))) for t in ids]))
        along = []
        for tokens_BQ in torch.split(tokens_BW, chunk, dim=1):
            column = self._column_K - self._cache.slots
            inside = np.flatnonzero((column >= 0) & (column < tokens_BQ.shape[1]))
            hidden_BQH = self._cache.prefill(tokens_BQ)
            rows_2k = self._on_device(np.stack([self._row_K[inside], column[inside]]))
            along.append(hidden_BQH[rows_2k[0], rows_2k[1]])
        return torch.cat(along)

    def _follow(
        self, along_KH: Tensor, sampler: _Sampler, ends: Sequence[int]
    ) -> NDArray[np.int64]:
        """Sample along the trunks; the branches that left them and have not ended."""
        left = []
        n = np.arange(len(self.row))
        for position in range(self._tokens_NP.shape[1]):
            hidden = along_KH[self._on_device(self._first_N[n] + position)]
            going = self._sample(n, hidden, sampler, ends)
            n = n[going]
            same = self._tokens_NP[n, position] == self._own_NP[n, position]
            self._shared_N[n] = position
            left.append(n[~same])
            n = n[same]
            if not len(n):
                break
        return np.sort(np.concatenate(left))

    def _sample(
        self, n: NDArray[np.int64], hidden_nH: Tensor, sampler: _Sampler, ends: Sequence[int]
    ) -> NDArray[np.bool_]:
        """Draw and record the next token of the branches ``n``; which of them go on."""
        position = self._lengths_N[n]
        tokens, logps = sampler(hidden_nH, *(key[n] for key in self._keys), position)
        self._tokens_NP[n, position], self._logps_NP[n, position] = tokens, logps
        self._lengths_N[n] += 1
        going: NDArray[np.bool_] = ~np.isin(tokens, ends)
        return going & (position + 1 < self._tokens_NP.shape[1])

    def _grow(self, group: NDArray[np.int64], sampler: _Sampler, ends: Sequence[int]) -> None:
        """Decode the branches of ``group``, a token of each per turn, until each has ended."""
        visible_GS = self._visible_trunk(group)
        living = np.arange(len(group))
        while len(living):
            hidden_GH = self._extend(group[living], visible_GS, living)
            living = living[self._sample(group[living], hidden_GH, sampler, ends)]

    def _visible_trunk(self, group: NDArray[np.int64]) -> Tensor:
        """What each branch sees of its row: the trunk until it left it; its own slots follow."""
        visible_GS = torch.zeros((len(group), self._room), dtype=torch.bool, device=self._device)
        depths = torch.arange(self._cache.slots, device=self._device)
        seen_G1 = self._on_device((self.start + self._shared_N)[group, None])
        visible_GS[:, : self._cache.slots] = depths < seen_G1
        return visible_GS

    def _extend(
        self, n: NDArray[np.int64], visible_GS: Tensor, living: NDArray[np.int64]
    ) -> Tensor:
        """Encode the newest token of the branches ``n``; their hidden rows."""
        places, newest = _places(self.row[n]), self._lengths_N[n] - 1
        tokens = self._tokens_NP[n, newest]
        index = np.stack([self.row[n], places, living, tokens, self.start[n] + newest])
        rows, columns, living_n, *new = self._on_device(index)
        filled, queries = self._cache.slots, int(places.max()) + 1
        slots = filled + queries
        visible_GS[living_n, filled + columns] = True
        shape = len(self._trunks), queries
        tokens_BQ, depths_BQ = (rows.new_zeros(shape).index_put_((rows, columns), v) for v in new)
        visible_BQS = visible_GS.new_zeros((*shape, slots))
        visible_BQS[:, :, 0] = True  # for filler tokens: attention over nothing would be NaN
        visible_BQS[rows, columns] = visible_GS[living_n, :slots]
        hidden_BQH = self._cache.extend(tokens_BQ, depths_BQ, visible_BQS)
        return hidden_BQH[rows, columns]

    def _on_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)

    def collect(self) -> list[list[list[Branch]]]:
        """``[trunk][step][sample]``."""
        columns = zip(self._tokens_NP, self._logps_NP, self._lengths_N, strict=True)
        flat = iter([Branch(tokens[:n].copy(), logps[:n].copy()) for tokens, logps, n in columns])
        return [[[next(flat) for _ in range(self._samples)] for _ in range(n)] for n in self._steps]


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
