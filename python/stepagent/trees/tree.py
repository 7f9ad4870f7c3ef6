"""Token trees: trajectories and the actions tried at their steps, every unique token once.

::

    pos    0 1 2 | 3 4        5 6 ...            u  task, o  observation
           u o₁  | â₁           ← branch, ends   a  the trunk's own action, â  one tried instead
           u o₁  | a₁ o₂ | â₂   ← branch
                         | a₂ …  ← trunk

    layout:  u o₁ â₁ a₁ o₂ â₂ a₂ …               depth-first pre-order
    rule:    q sees k  ⇔  k ≤ q < subtree_end[k]

T step pairs cost O(T) tokens in place of the O(T²) of T separate sequences, and each token sees
exactly what it would see in a sequence of its own. `pack_step_pairs` does not merge the tokens that
siblings begin with in common: it would save little, and a branch stays one contiguous run.
`pack_sequences` merges all that sequences share. docs/trees.md draws both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from operator import index
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.attention.flex_attention import BlockMask

from .. import _core
from ..checks import as_numpy
from ..data.trunk import Trunk
from .layers import layer_windows

Array: TypeAlias = Any  # a numpy array; a torch tensor after TokenTree.to
INT32_MAX = np.iinfo(np.int32).max
BLOCK_SIZE = 128  # FlexAttention's default
TOKENS_PER_THREAD = 2**18  # below, starting a thread costs more than it saves

_CORE_IDS = {np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint64)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class Sample(Protocol):
    """An action as ``inspect`` returns it."""

    @property
    def token_ids(self) -> ArrayLike: ...


@dataclass(frozen=True, eq=False)
class TokenTree:
    """One packed tree: L tokens, N scored tokens, S steps (a step is one action, tried or own).

    All arrays are int32: numpy as packed, torch after ``to``. Tokens are in depth-first pre-order.

    Attributes:
        input_ids: (L,) the tokens.
        position_ids: (L,) the depth in the token's own trajectory.
        subtree_end: (L,) the index after the token's last descendant.
        labels: (N,) the scored tokens.
        label_rows: (N,) ``hidden[label_rows[n]]`` predicts ``labels[n]``: the row of the token's
            parent, so siblings share one.
        step_offsets: (S + 1,) the scored tokens of step s are
            ``step_offsets[s]:step_offsets[s + 1]``.
        step_trunk: (S,) the trunk, or the sequence, that the step is of.
        step_index: (S,) which step of the trunk.
        step_branch: (S,) which action there, 0: the trunk's own, 1..: the branches.
        extras: what else was given per token, by name, for the scored tokens, each (N,) in its own
            dtype.
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
    extras: dict[str, Array] = field(default_factory=dict)

    def state_rows(self) -> NDArray[np.int64]:
        """(S,) the row of the last token of the state that each step's action was taken in.

        Raises:
            ValueError: for a step without tokens.
        """
        first_S, _ = self._scored_tokens()
        rows_S: NDArray[np.int64] = on_host(self.label_rows)[first_S].astype(np.int64)
        return rows_S

    def action_rows(self) -> NDArray[np.int64]:
        """(S,) the row of the last token of each step's action.

        Raises:
            ValueError: for a step without tokens.
        """
        last_S = self._scored_tokens()[1]
        ids, depths = (on_host(a).astype(np.int64) for a in (self.input_ids, self.position_ids))
        parents, width = parent_rows(depths), int(ids.max()) + 1
        # Children of one parent that hold the same token have seen the same: any of them will do.
        keys = parents * width + ids
        order = np.argsort(keys, kind="stable")
        wanted = on_host(self.label_rows)[last_S] * width + on_host(self.labels)[last_S]
        rows_S: NDArray[np.int64] = order[np.searchsorted(keys[order], wanted)]
        return rows_S

    def _scored_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first and the last scored token of each step."""
        offsets = on_host(self.step_offsets).astype(np.int64)
        for s in np.flatnonzero(np.diff(offsets) == 0)[:1]:
            raise ValueError(f"step {s} must have at least one token, got none")
        return offsets[:-1], offsets[1:] - 1

    def attention_mask(
        self,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """The dense mask, (1, 1, L, L), at 0, 0, q, k: k ≤ q < subtree_end[k].

        Args:
            dtype: ``torch.bool``: True where q sees k. A floating dtype: 0 there, the dtype's
                minimum elsewhere, to be added to the scores.
            device: where the mask goes; None: where the tree is.
            window: at least 1: k must also lie less than that many positions back, as in
                sliding-window layers.

        Raises:
            TypeError: for another dtype.
            ValueError: for window < 1.
        """
        if dtype != torch.bool and not dtype.is_floating_point:
            raise TypeError(f"dtype must be torch.bool or floating point, got {dtype}")
        _check_window(window)
        ends = torch.as_tensor(self.subtree_end, device=device)
        if ends.device.type == "cpu":
            return _filled_mask(on_host(ends), dtype, window)[None, None]
        visible = visible_tokens(ends)
        if window is not None:
            depth = torch.as_tensor(self.position_ids, device=device)
            visible &= depth[:, None] - depth < window
        mask = visible if dtype == torch.bool else additive_mask(visible, dtype)
        return mask[None, None]

    def block_mask(
        self, device: torch.device | str = "cpu", *, window: int | None = None
    ) -> BlockMask:
        """The same mask for FlexAttention, in O(L + (L / 128)²) on the CPU.

        Equal to ``create_block_mask`` on the rule, which evaluates all L² entries: here the pairs
        that see each other are counted per block from where subtrees, and windows, begin and end.

        Args:
            device: where the mask goes.
            window: as in `attention_mask`.
        """
        _check_window(window)
        ends = on_host(self.subtree_end)
        size = -(-len(ends) // BLOCK_SIZE)
        lists = [
            torch.from_numpy(array).to(device).view(1, 1, size, -1)
            for array in _core.block_lists(ends, window, BLOCK_SIZE)
        ]
        partial_counts, partial_indices, full_counts, full_indices = lists
        return BlockMask.from_kv_blocks(
            partial_counts[..., 0],
            partial_indices,
            full_counts[..., 0],
            full_indices,
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=self._mask_mod(device, window),
            seq_lengths=(len(ends), len(ends)),
        )

    def attention_masks(
        self, config: Any, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """`attention_mask` per layer type, as transformers takes it from models that mix them.

        Args:
            config: a transformers configuration with ``layer_types``.
            dtype: as in `attention_mask`.
            device: as in `attention_mask`.

        Raises:
            ValueError: where the configuration has no ``layer_types``, or has layers that are
                neither full nor sliding-window attention.
        """
        windows = layer_windows(config)
        return {kind: self.attention_mask(dtype, device, window=windows[kind]) for kind in windows}

    def block_masks(self, config: Any, device: torch.device | str = "cpu") -> dict[str, BlockMask]:
        """`block_mask` per layer type; see `attention_masks`."""
        windows = layer_windows(config)
        return {kind: self.block_mask(device, window=windows[kind]) for kind in windows}

    def to(self, device: torch.device | str) -> TokenTree:
        """The same tree held in torch tensors on `device`; on the CPU they share its memory."""

        def tensors(values: Any) -> Any:
            if isinstance(values, dict):
                return {name: tensors(array) for name, array in values.items()}
            return torch.as_tensor(values, device=device)

        return TokenTree(*(tensors(getattr(self, field.name)) for field in fields(self)))

    def _mask_mod(
        self, device: torch.device | str, window: int | None
    ) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
        ends = torch.as_tensor(self.subtree_end, device=device)
        if window is None:
            return lambda b, h, q, k: (k <= q) & (q < ends[k])
        depth = torch.as_tensor(self.position_ids, device=device)
        # Tensors only: a number would be compiled in, anew for each window.
        horizon = depth - window
        return lambda b, h, q, k: (k <= q) & (q < ends[k]) & (depth[k] > horizon[q])


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")


def parent_rows(depths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(L,) the row of each token's parent, -1 for a root: from the depths in pre-order."""
    L, rows = len(depths), np.arange(len(depths))
    # A token's parent is the last one before it that lies one level higher.
    levels = np.sort(depths * L + rows)
    before = levels[np.searchsorted(levels, (depths - 1) * L + rows) - 1] % L
    return np.where(depths > 0, before, -1)


def on_host(array: Array) -> NDArray[Any]:
    """A tree's array for the core, which takes contiguous int32 only."""
    host = array.numpy(force=True) if isinstance(array, torch.Tensor) else array
    return np.ascontiguousarray(host)


def _filled_mask(ends: NDArray[np.int32], dtype: torch.dtype, window: int | None) -> torch.Tensor:
    """The dense mask (L, L), written by the core as bit patterns of `dtype`."""
    bits = _BITS[dtype.itemsize]
    if dtype == torch.bool:
        visible, hidden = 1, 0
    else:
        lowest = torch.tensor(torch.finfo(dtype).min, dtype=dtype).view(bits)
        visible, hidden = 0, int(lowest) % (1 << 8 * dtype.itemsize)
    mask = torch.empty((len(ends), len(ends)), dtype=dtype)
    threads = _threads(mask.numel() // 16)
    _core.fill_mask(ends, window, visible, hidden, mask.view(bits).numpy(), threads)
    return mask


def _threads(tokens: int) -> int:
    """How many threads are worth starting, at most as many as torch may use."""
    return min(torch.get_num_threads(), 1 + tokens // TOKENS_PER_THREAD)


def visible_tokens(subtree_end: torch.Tensor) -> torch.Tensor:
    """(..., L, L) bool, [q, k]: k ≤ q < subtree_end[k], for subtree ends (..., L)."""
    k = torch.arange(subtree_end.shape[-1], device=subtree_end.device)
    q = k[:, None]
    return (k <= q) & (q < subtree_end[..., None, :])


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask to be added to attention scores: 0 where visible, else the dtype's minimum."""
    mask = torch.zeros_like(visible, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def pack_step_pairs(
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[ArrayLike | Sample]]],
    *,
    max_tokens: int | None = None,
) -> list[TokenTree]:
    """Pack trajectories and the actions tried at their steps into token trees.

    A branch equal to the trunk's own action, or to an earlier branch of its step, adds no token but
    stays a step; an empty branch is a step without labels. Steps are ordered by trunk, step,
    branch. Where a trunk rewinds, so does its tree. Trunks fill one tree after the other, in order;
    a trunk with its branches is never split.

    Args:
        trunks: the trajectories.
        branches: ``branches[i][t]`` lists the actions tried at step t of ``trunks[i]``: token ids
            ≥ 0 as a list, a numpy or torch array (int32 or int64), or an object with such
            ``token_ids``.
        max_tokens: each tree has at most so many; None: one tree for all.

    Raises:
        ValueError: where branches do not match trunks and steps, an id lies outside [0, 2³¹), a
            branch is not one-dimensional, a trunk with its branches exceeds max_tokens, or a tree
            2³¹ - 1.
        TypeError: where a trunk is not a Trunk or a branch holds no integers.
    """
    limit = _check_max_tokens(max_tokens)
    _check_structure(trunks, branches)
    tried = [actions for steps in branches for actions in steps]
    branch_ids = _each(
        _as_ids,
        (action for actions in tried for action in actions),
        lambda branch: _branch_name(branches, branch),
    )
    packed = _core.pack_step_pairs(
        [trunk.input_ids for trunk in trunks],
        [np.ascontiguousarray(trunk.action_spans) for trunk in trunks],
        [np.ascontiguousarray(trunk.rewinds) for trunk in trunks],
        branch_ids,
        np.array([len(actions) for actions in tried], np.int64),
        limit,
        _threads(sum(len(trunk.input_ids) for trunk in trunks)),
    )
    return [TokenTree(**tree) for tree in packed]


def pack_sequences(
    sequences: Sequence[ArrayLike],
    action_masks: Sequence[ArrayLike],
    *,
    max_tokens: int | None = None,
    extras: Mapping[str, Sequence[ArrayLike]] | None = None,
) -> list[TokenTree]:
    """Pack any sequences into token trees: their prefix tree, every shared beginning once.

    step_trunk is the sequence, step_index the run of True in its mask, step_branch 0; steps are
    ordered by sequence and run. A token that sequences share stays scored once for each of them.
    Children follow each other in the order in which sequences first lead to them.

    Sequences that begin with the same token are a block; blocks fill one tree after the other, in
    order of first appearance. A block beyond ``max_tokens`` is cut into several, between sequences
    in the order of the tree, so that the fewest tokens are repeated, then into the fewest: each
    repeats what its first sequence shares with the one before.

    Args:
        sequences: each of at least one token id ≥ 0, as a list, a numpy or torch array (int32 or
            int64).
        action_masks: each as long as its sequence, True where the token is scored; booleans, or 0
            and 1. The first token cannot be: no row predicts it.
        max_tokens: each tree has at most so many; None: one tree for all.
        extras: ``extras[name][i]`` as long as ``sequences[i]``, numbers to be carried to the scored
            tokens (rollout log-probs, advantages, rewards): they become ``tree.extras[name]`` (N,).

    Raises:
        ValueError: where lengths differ, a sequence is empty, an id lies outside [0, 2³¹), a mask
            holds something else than 0 and 1 or scores a first token, a sequence exceeds
            max_tokens, or a tree 2³¹ - 1.
        TypeError: for other dtypes.
    """
    limit = _check_max_tokens(max_tokens)
    ids = _each(_as_ids, sequences, lambda i: f"sequences[{i}]")
    masks = _each(_as_mask, action_masks, lambda i: f"action_masks[{i}]")
    values = {
        name: _extra_arrays(f"extras[{name!r}]", arrays, ids)
        for name, arrays in (extras or {}).items()
    }
    tokens = sum(len(sequence) for sequence in ids)
    trees = []
    for packed in _core.pack_sequences(ids, masks, limit, _threads(tokens)):
        members = np.unique(packed["step_trunk"])
        scored = {name: _scored(arrays, masks, members) for name, arrays in values.items()}
        trees.append(TokenTree(**packed, extras=scored))
    return trees


def _scored(
    arrays: list[NDArray[Any]], masks: list[NDArray[np.uint8]], members: NDArray[np.int32]
) -> NDArray[Any]:
    """The values of the members' scored tokens, one after the other, as a tree orders them."""
    none = arrays[0][:0]  # of the right dtype
    return np.concatenate([none, *(arrays[i][masks[i].view(bool)] for i in members)])


def _check_max_tokens(max_tokens: int | None) -> int | None:
    if max_tokens is None:
        return None
    try:
        limit = index(max_tokens)
    except TypeError:
        raise TypeError(f"max_tokens must be an integer or None, got {max_tokens!r}") from None
    if limit < 1:
        raise ValueError(f"max_tokens must be at least 1, got {limit}")
    return min(limit, INT32_MAX)  # what a tree's indices can count


def _check_structure(
    trunks: Sequence[Trunk], branches: Sequence[Sequence[Sequence[ArrayLike | Sample]]]
) -> None:
    if len(branches) != len(trunks):
        raise ValueError(
            f"branches must have {len(trunks)} entries, one a trunk, got {len(branches)}"
        )
    for i, (trunk, steps) in enumerate(zip(trunks, branches, strict=True)):
        if not isinstance(trunk, Trunk):
            raise TypeError(f"trunks[{i}] must be a Trunk, got a {type(trunk).__name__}")
        if len(steps) != len(trunk.action_spans):
            raise ValueError(
                f"branches[{i}] must have {len(trunk.action_spans)} entries, one a step of "
                f"trunks[{i}], got {len(steps)}"
            )


def _each(
    convert: Callable[[Any], NDArray[Any]], values: Iterable[Any], name: Callable[[int], str]
) -> list[NDArray[Any]]:
    """Every value converted; an error begins with the name of the value."""
    arrays = []
    for i, value in enumerate(values):
        try:
            arrays.append(convert(value))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name(i)} {error}") from None
    return arrays


def _branch_name(branches: Sequence[Sequence[Sequence[Any]]], branch: int) -> str:
    places = (
        (i, t, k)
        for i, steps in enumerate(branches)
        for t, actions in enumerate(steps)
        for k in range(len(actions))
    )
    i, t, k = next(islice(places, branch, None))
    return f"branches[{i}][{t}][{k}]"


def _as_array(values: Any, of: str) -> NDArray[Any]:
    """Whatever the values are held in, as a numpy array with one dimension."""
    try:
        array = as_numpy(values)
    except TypeError:
        raise TypeError(f"must be an array of {of}") from None
    if array.ndim != 1:
        raise ValueError(f"must be one-dimensional, got shape {array.shape}")
    return array


def _as_ids(values: Any) -> NDArray[Any]:
    """Token ids as the core takes them: a type of its own, contiguous. It checks their range."""
    array = _as_array(getattr(values, "token_ids", values), "integers")
    if array.dtype in _CORE_IDS and array.flags.c_contiguous and array.flags.aligned:
        return array
    if not array.size:  # an empty list converts to float64
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"must hold integers, got dtype {array.dtype}")
    return array.astype(np.uint64 if array.dtype.kind == "u" else np.int64)


def _as_mask(values: Any) -> NDArray[np.uint8]:
    array = _as_array(values, "booleans")
    if array.dtype.kind in "iu":
        for p in np.flatnonzero((array != 0) & (array != 1))[:1]:
            raise ValueError(f"must hold 0 and 1 only, got {array[p]} at {p}")
    elif array.dtype != bool and array.size:
        raise TypeError(f"must be boolean, or hold 0 and 1, got dtype {array.dtype}")
    return np.ascontiguousarray(array, dtype=bool).view(np.uint8)


def _extra_arrays(name: str, values: Sequence[Any], ids: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """One array of numbers per sequence, as long as it, all of one dtype."""
    if len(values) != len(ids):
        raise ValueError(f"{name} must have {len(ids)} entries, one a sequence, got {len(values)}")
    arrays = _each(lambda value: _as_array(value, "numbers"), values, lambda i: f"{name}[{i}]")
    for i, array in enumerate(arrays):
        if len(array) != len(ids[i]):
            raise ValueError(
                f"{name}[{i}] must have {len(ids[i])} entries, one a token of sequences[{i}], "
                f"got {len(array)}"
            )
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name}[{i}] must hold numbers, got dtype {array.dtype}")
        if array.dtype != arrays[0].dtype:
            raise TypeError(
                f"{name}[{i}] must have the dtype of {name}[0], {arrays[0].dtype}, "
                f"got {array.dtype}"
            )
    return arrays
