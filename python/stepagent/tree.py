"""Token trees: trajectories and the actions tried at their steps, every unique token once.

::

    pos    0 1 2 | 3 4        5 6 ...            u  task, o  observation
           u o₁  | â₁           ← branch, ends   a  the trunk's own action, â  one tried instead
           u o₁  | a₁ o₂ | â₂   ← branch
                         | a₂ …  ← trunk

    layout:  u o₁ â₁ a₁ o₂ â₂ a₂ …               depth-first pre-order
    rule:    q sees k  ⇔  k ≤ q < subtree_end[k]

T step pairs cost O(T) tokens in place of the O(T²) of T separate sequences, and each token sees
exactly what it would see in a sequence of its own. Tokens that siblings begin with in common are
not merged: it would save little, and a branch stays one contiguous run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.attention.flex_attention import BlockMask

from ._core import pack_step_pairs as _pack_step_pairs
from .encoding import Trunk

Array: TypeAlias = Any  # a numpy array; a torch tensor after TokenTree.to
INT32_MAX = np.iinfo(np.int32).max
BLOCK_SIZE = 128  # FlexAttention's default


class Sample(Protocol):
    """An action as ``inspect`` returns it."""

    @property
    def token_ids(self) -> ArrayLike: ...


@dataclass(frozen=True, eq=False)
class TokenTree:
    """One packed tree: L tokens, N scored tokens, S steps (a step is one action, tried or own).

    All arrays are int32: numpy as packed, torch after ``to``. Tokens, in depth-first pre-order:
    input_ids (L,); position_ids (L,), the depth in the token's own trajectory; subtree_end (L,),
    the index after the token's last descendant. Scored tokens: ``hidden[label_rows[n]]`` predicts
    ``labels[n]``, both (N,); the row is that of the token's parent, so siblings share one. Steps:
    the tokens ``step_offsets[s]:step_offsets[s + 1]``, (S + 1,), are those of the action
    step_branch[s] (0: the trunk's own, 1..: the branches) at step step_index[s] of trunk
    step_trunk[s], each (S,).
    """

    input_ids: Array
    position_ids: Array
    subtree_end: Array
    labels: Array
    label_rows: Array
    step_offsets: Array
    step_trunk: Array
    step_index: Array
    step_branch: Array

    def attention_mask(
        self,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """The dense mask, (1, 1, L, L), [0, 0, q, k]: k ≤ q < subtree_end[k].

        ``torch.bool``: True where q sees k. A floating dtype: 0 there, the dtype's minimum
        elsewhere, to be added to the scores. device: where the tree is, unless given. With
        window ≥ 1, k must also lie less than that many positions back, as in sliding-window layers.
        Raises TypeError for another dtype and ValueError for window < 1.
        """
        if dtype != torch.bool and not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; a mask is torch.bool or floating point")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; it must be at least 1: a token sees itself")
        visible = visible_tokens(torch.as_tensor(self.subtree_end, device=device))
        if window is not None:
            depth = torch.as_tensor(self.position_ids, device=device)
            visible &= depth[:, None] - depth < window
        mask = visible if dtype == torch.bool else additive_mask(visible, dtype)
        return mask[None, None]

    def block_mask(self, device: torch.device | str) -> BlockMask:
        """The same mask for FlexAttention, from the subtree intervals in O((L / 128)²).

        Equal to ``create_block_mask`` on the rule, which evaluates all L² entries. Block (i, j) of
        queries and keys holds a visible pair iff j ≤ i and max subtree_end(j) > first q of i; it is
        full, and needs no rule inside, iff j < i and min subtree_end(j) > last q of i.
        """
        subtree_end = torch.as_tensor(self.subtree_end, device=device)
        length = len(subtree_end)
        first_q = torch.arange(0, length, BLOCK_SIZE, device=device)
        # Rows past L count as queries that see nothing, so a ragged last block is never full.
        last_q = first_q + BLOCK_SIZE - 1
        padded = torch.nn.functional.pad(subtree_end, (0, -length % BLOCK_SIZE), value=length)
        earliest, latest = padded.view(-1, BLOCK_SIZE).aminmax(dim=-1)
        visible = (first_q <= first_q[:, None]) & (latest > first_q[:, None])
        full = (first_q < first_q[:, None]) & (earliest > last_q[:, None])
        return BlockMask.from_kv_blocks(
            *_block_lists(visible & ~full),
            *_block_lists(full),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=lambda b, h, q, k: (k <= q) & (q < subtree_end[k]),
            seq_lengths=(length, length),
        )

    def to(self, device: torch.device | str) -> TokenTree:
        """The same tree held in torch tensors on `device`; on the CPU they share its memory."""
        return TokenTree(
            *(torch.as_tensor(getattr(self, field.name), device=device) for field in fields(self))
        )


def visible_tokens(subtree_end: torch.Tensor) -> torch.Tensor:
    """(..., L, L) bool, [q, k]: k ≤ q < subtree_end[k], for subtree ends (..., L)."""
    k = torch.arange(subtree_end.shape[-1], device=subtree_end.device)
    q = k[:, None]
    return (k <= q) & (q < subtree_end[..., None, :])


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask to be added to attention scores: 0 where visible, else the dtype's minimum."""
    mask = torch.zeros_like(visible, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row of blocks, how many are set and which: the set ones first, in ascending order."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], order.int()[None, None]


def pack_step_pairs(
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[ArrayLike | Sample]]],
    *,
    max_tokens: int | None = None,
) -> list[TokenTree]:
    """Pack trajectories and the actions tried at their steps into token trees.

    branches[i][t] lists the actions tried at step t of trunks[i]: token ids ≥ 0 as a list, a numpy
    or torch array (int32 or int64), or an object with such ``token_ids``. A branch equal to the
    trunk's own action, or to an earlier branch of its step, adds no token but stays a step; an
    empty branch is a step without labels. Steps are ordered by trunk, step, branch.

    Trunks fill one tree after the other, in order, each up to max_tokens; None means one tree. A
    trunk with its branches is never split.

    Raises ValueError where branches do not match trunks and steps, an id lies outside [0, 2³¹), a
    branch is not one-dimensional, or a trunk with its branches exceeds max_tokens; TypeError where
    a trunk is not a Trunk or a branch holds no integers.
    """
    limit = _check_max_tokens(max_tokens)
    _check_structure(trunks, branches)
    if not trunks:
        return []
    # Lists of arrays are joined whole: the work per branch is one conversion and one length.
    tried = [actions for steps in branches for actions in steps]
    arrays = [_as_array(action) for actions in tried for action in actions]
    trunk_steps = _offsets([len(trunk.action_spans) for trunk in trunks])
    step_branches = _offsets([len(actions) for actions in tried])
    branch_ids, branch_offsets = _join(arrays, trunk_steps, step_branches)
    packed = _pack_step_pairs(
        np.concatenate([trunk.input_ids for trunk in trunks]),
        _offsets([len(trunk.input_ids) for trunk in trunks]),
        trunk_steps,
        np.concatenate([trunk.action_spans for trunk in trunks]),
        branch_ids,
        branch_offsets,
        step_branches,
        limit,
    )
    return [TokenTree(**tree) for tree in packed]


def _check_max_tokens(max_tokens: int | None) -> int:
    if max_tokens is None:
        return INT32_MAX  # what the tree's indices can count
    try:
        limit = index(max_tokens)
    except TypeError:
        raise TypeError(f"max_tokens is {max_tokens!r}; it must be an integer or None") from None
    if limit < 1:
        raise ValueError(f"max_tokens is {limit}; it must be at least 1")
    return min(limit, INT32_MAX)


def _check_structure(
    trunks: Sequence[Trunk], branches: Sequence[Sequence[Sequence[ArrayLike | Sample]]]
) -> None:
    if len(branches) != len(trunks):
        raise ValueError(f"branches has {len(branches)} entries for {len(trunks)} trunks")
    for i, (trunk, steps) in enumerate(zip(trunks, branches, strict=True)):
        if not isinstance(trunk, Trunk):
            raise TypeError(f"trunks[{i}] is a {type(trunk).__name__}; it must be a Trunk")
        if len(steps) != len(trunk.action_spans):
            raise ValueError(
                f"branches[{i}] has {len(steps)} entries, but trunks[{i}] has "
                f"{len(trunk.action_spans)} steps"
            )


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)


def _as_array(action: ArrayLike | Sample) -> NDArray[Any] | None:
    """One branch as an array, of whatever it holds; None if it is no array of numbers at all."""
    ids = getattr(action, "token_ids", action)
    try:
        return ids.numpy(force=True) if isinstance(ids, torch.Tensor) else np.asarray(ids)
    except (TypeError, ValueError):  # a bfloat16 tensor, a ragged list
        return None


def _join(
    arrays: list[NDArray[Any] | None],
    trunk_steps: NDArray[np.int64],
    step_branches: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Join branches into one run of ids and its offsets, (B + 1,), naming the one that is wrong."""

    def name(branch: int) -> str:
        # The last offset ≤ branch: steps without branches repeat an offset and are passed over.
        step = int(np.searchsorted(step_branches, branch, side="right")) - 1
        trunk = int(np.searchsorted(trunk_steps, step, side="right")) - 1
        return f"branches[{trunk}][{step - trunk_steps[trunk]}][{branch - step_branches[step]}]"

    valid: list[NDArray[Any]] = []
    for branch, array in enumerate(arrays):
        if array is None:
            raise TypeError(f"{name(branch)} is not an array of integers")
        if array.ndim != 1:
            raise ValueError(f"{name(branch)} has shape {array.shape}; it must be one-dimensional")
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{name(branch)} has dtype {array.dtype}; token ids are integers")
        # An empty list converts to float64, which would turn all joined ids into floats.
        valid.append(array if array.size else np.empty(0, np.int32))
    offsets = _offsets([len(array) for array in valid])
    ids = np.concatenate([np.empty(0, np.int32), *valid])
    wrong = np.flatnonzero((ids < 0) | (ids > INT32_MAX))
    if wrong.size:
        branch = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
        raise ValueError(
            f"{name(branch)}[{wrong[0] - offsets[branch]}] is {ids[wrong[0]]}; "
            f"token ids lie in [0, {INT32_MAX}]"
        )
    return ids.astype(np.int32, copy=False), offsets
