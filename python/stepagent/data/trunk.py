"""Trunks: a trajectory's tokens, and which of them are its actions.

Mostly a trunk is one line of tokens. Where a chat template rewrites history, as Qwen3's leaves out
the thoughts of earlier turns, the next state does not continue what was produced; then the line
goes back to the last token that both have in common, and on from there:

    input_ids   u o₁ t₁ a₁ │ a₁ o₂ t₂ a₂     u task, o observation, t thought, a action
    rewinds                 └ after u o₁

Each action follows exactly the state that the agent saw. docs/encoding.md draws the tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Trunk:
    """One trajectory's tokens and the half-open spans of its T actions.

    Lists, numpy and torch arrays of int32 or int64 are accepted; read-only int32 numpy copies are
    kept.

    Args:
        input_ids: (L,) token ids, ≥ 0.
        action_spans: (T, 2), T ≥ 1, each ``[start, end)`` with 1 ≤ start < end ≤ L, ascending, not
            overlapping; the end-of-turn token is inside the span. A span starts at 1 at the
            earliest because a row must predict its first token.
        rewinds: (K, 2), each ``[at, depth]``: the token ``at`` and those after it follow the
            first ``depth`` tokens of the line before it. Ascending, after the action before and
            before the last token of a state, each back: ``depth`` is less than the tokens before.
            Empty where the trunk is one line.

    Raises:
        TypeError: For other dtypes.
        ValueError: Where a rule above is broken.
    """

    input_ids: NDArray[np.int32]
    action_spans: NDArray[np.int32]
    rewinds: NDArray[np.int32]

    def __init__(
        self, input_ids: ArrayLike, action_spans: ArrayLike, rewinds: ArrayLike = ()
    ) -> None:
        ids = _integers("input_ids", input_ids)
        spans = _integers("action_spans", action_spans)
        backs = _integers("rewinds", rewinds)
        if not backs.size:
            backs = backs.reshape(0, 2)
        _check_ids(ids)
        _check_spans(spans, len(ids))
        _check_rewinds(backs, spans)
        object.__setattr__(self, "input_ids", _frozen_int32(ids))
        object.__setattr__(self, "action_spans", _frozen_int32(spans))
        object.__setattr__(self, "rewinds", _frozen_int32(backs))

    @property
    def num_steps(self) -> int:
        """T, the number of actions."""
        return len(self.action_spans)

    @property
    def action_mask(self) -> NDArray[np.bool_]:
        """(L,), True for the tokens of actions, as `stepagent.pack_sequences` takes it."""
        mask = np.zeros(len(self.input_ids), dtype=bool)
        for start, end in self.action_spans:
            mask[start:end] = True
        return mask

    @cached_property
    def position_ids(self) -> NDArray[np.int32]:
        """(L,) int32, how many tokens each one sees before it."""
        positions = np.arange(len(self.input_ids), dtype=np.int32)
        for at, depth in self.rewinds:
            positions[at:] -= positions[at] - depth
        return positions

    @cached_property
    def subtree_end(self) -> NDArray[np.int32]:
        """(L,) int32, as `stepagent.TokenTree` has it: token q sees k if k ≤ q < subtree_end[k]."""
        ends = np.full(len(self.input_ids), len(self.input_ids), np.int32)
        for rows, (at, depth) in zip(self._lines, self.rewinds, strict=False):
            ends[rows[depth:]] = at
        return ends

    def rows_before(self, index: int) -> NDArray[np.int64]:
        """The places of all tokens that the token ``index`` sees, without itself, in order."""
        line = int(np.searchsorted(self.rewinds[:, 0], index, side="right"))
        return self._lines[line][: self.position_ids[index]]

    def state_ids(self, step: int) -> NDArray[np.int32]:
        """The tokens of the state in which this step's action was taken, int32."""
        start = int(self.action_spans[step, 0])
        if not len(self.rewinds):
            return self.input_ids[:start]
        return self.input_ids[self.rows_before(start)]

    def lines(self) -> list[Trunk]:
        """The trunk as trunks of one line each, for what cannot take a tree; [self] where it is
        one. Together they have its steps, in order, each after the same tokens."""
        if not len(self.rewinds):
            return [self]
        bounds = [0, *self.rewinds[:, 0].tolist(), len(self.input_ids)]
        starts, ends = self.action_spans.T
        found = []
        for rows, first, last in zip(self._lines, bounds[:-1], bounds[1:], strict=True):
            inside = self.action_spans[(starts >= first) & (ends <= last)]
            if len(inside):  # rows end with first … last − 1
                found.append(Trunk(self.input_ids[rows], inside - first + len(rows) - last + first))
        return found

    def first_steps(self, count: int) -> Trunk:
        """The trunk up to the end of its step ``count - 1``; self where it has no more steps.

        Raises:
            ValueError: for a count < 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if count >= self.num_steps:
            return self
        end = int(self.action_spans[count - 1, 1])
        rewinds = self.rewinds[self.rewinds[:, 0] < end]
        return Trunk(self.input_ids[:end], self.action_spans[:count], rewinds)

    def shared_steps(self, other: Trunk) -> int:
        """How many steps both begin with: the same actions, each in the same state."""
        both = min(self.num_steps, other.num_steps)
        for step, (own, others) in enumerate(
            zip(self.action_spans[:both], other.action_spans[:both], strict=True)
        ):
            action = self.input_ids[slice(*own)], other.input_ids[slice(*others)]
            state = self.state_ids(step), other.state_ids(step)
            if not (np.array_equal(*action) and np.array_equal(*state)):
                return step
        return both

    def and_then(self, other: Trunk, step: int) -> Trunk:
        """This trunk, and behind it the steps of ``other`` from ``step`` on, each in its own state.

        The line goes back to the last token that the last line here and that state have in common,
        or to the one before the state's last, which is there a second time: it predicts the action.
        """
        start = int(other.action_spans[step, 0])
        state, last = other.state_ids(step), self.input_ids[self._lines[-1]]
        size = len(self.input_ids)
        most = min(len(state) - 1, len(last))
        differs = np.flatnonzero(state[:most] != last[:most])
        depth = int(differs[0]) if len(differs) else most
        back = [[size, depth]] if depth < len(last) else []
        moved = size + len(state) - depth - start
        later = other.rewinds[other.rewinds[:, 0] > start] + [moved, 0]
        return Trunk(
            np.concatenate([self.input_ids, state[depth:], other.input_ids[start:]]),
            np.concatenate([self.action_spans, other.action_spans[step:] + moved]),
            np.concatenate([self.rewinds, np.array(back, np.int64).reshape(-1, 2), later]),
        )

    @cached_property
    def _lines(self) -> list[NDArray[np.int64]]:
        """The places of the tokens of each line, from its first to the one before a rewind."""
        bounds = [0, *self.rewinds[:, 0].tolist(), len(self.input_ids)]
        lines = [np.arange(bounds[1])]
        for depth, first, last in zip(self.rewinds[:, 1], bounds[1:-1], bounds[2:], strict=True):
            lines.append(np.concatenate([lines[-1][:depth], np.arange(first, last)]))
        return lines


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError as error:  # ragged lists
        raise ValueError(f"{name} must be an array: {error}") from error
    if array.size and array.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must be int32 or int64, got {array.dtype}")
    return array.astype(np.int64)


def _frozen_int32(array: NDArray[np.int64]) -> NDArray[np.int32]:
    copy = array.astype(np.int32)
    copy.flags.writeable = False
    return copy


def _check_ids(ids: NDArray[np.int64]) -> None:
    if ids.ndim != 1:
        raise ValueError(f"input_ids must be one-dimensional, got shape {ids.shape}")
    for index in np.flatnonzero((ids < 0) | (ids > INT32_MAX))[:1]:
        raise ValueError(f"input_ids[{index}] must lie in [0, {INT32_MAX}], got {ids[index]}")


def _check_spans(spans: NDArray[np.int64], length: int) -> None:
    if spans.ndim != 2 or spans.shape[1] != 2 or len(spans) == 0:
        raise ValueError(f"action_spans must be (T, 2) with T >= 1, got shape {spans.shape}")
    previous_end = 1
    for index, (start, end) in enumerate(spans.tolist()):
        if start < 1:
            rule = "must start at 1 or later: a row must predict the first token"
        elif end <= start:
            rule = "must not be empty: start < end"
        elif end > length:
            rule = f"must end within the {length} input_ids"
        elif start < previous_end:
            rule = f"must start at or after {previous_end}, where the span before it ends"
        else:
            previous_end = end
            continue
        raise ValueError(f"action_spans[{index}] {rule}, got [{start}, {end})")


def _check_rewinds(rewinds: NDArray[np.int64], spans: NDArray[np.int64]) -> None:
    if rewinds.ndim != 2 or rewinds.shape[1] != 2:
        raise ValueError(f"rewinds must be (K, 2), got shape {rewinds.shape}")
    before, depth = 0, 0
    for index, (at, back) in enumerate(rewinds.tolist()):
        step = int(np.searchsorted(spans[:, 0], at, side="right"))  # the next action's
        if at <= before:
            rule = "must come after the one before it, and after the first token"
        elif step == len(spans):
            rule = "must come before the last token of a state: no action follows"
        elif step and at < spans[step - 1, 1]:
            rule = f"must not lie in or just before the action {spans[step - 1].tolist()}"
        elif not 0 <= back < depth + at - before:
            rule = f"must go back: its depth must lie in [0, {depth + at - before})"
        else:
            before, depth = at, back
            continue
        raise ValueError(f"rewinds[{index}] {rule}, got [{at}, {back}]")
