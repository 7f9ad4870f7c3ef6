"""One layer of the key-value cache; alone in its file because it makes transformers load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from torch import Tensor


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Appends in place to buffers with room to spare.

    transformers' own layer concatenates, which copies the whole cache at every token. ``keys`` and
    ``values`` are the filled part of the buffers, (B, heads, S, D).

    Where ``at`` is set, (n,) int64 slots, new ones are written there and the whole room is shown.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._buffers: list[Tensor] = []
        self.at: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, n, D) of each, or write it ``at``; all keys and all values."""
        if self.at is not None:
            keys, values = self._buffers
            keys.index_copy_(2, self.at, key_states)
            values.index_copy_(2, self.at, value_states)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        filled = self.get_seq_length()
        total = filled + key_states.shape[2]
        if total > self._buffers[0].shape[2]:
            # Doubled where the need was not known beforehand: each slot is then copied about once.
            self._room = max(self._room, total if filled == 0 else 2 * total)
            self._buffers = [_with_room(buffer, self._room, filled) for buffer in self._buffers]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, filled:total] = new
        return self._show(total)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        filled = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._show(filled)

    def _show(self, slots: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :slots] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _with_room(buffer: Tensor, room: int, filled: int) -> Tensor:
    rows, heads, _, size = buffer.shape
    # Zeros: attention multiplies what it does not see by 0, and 0 times NaN would be NaN.
    larger = buffer.new_zeros((rows, heads, room, size))
    larger[:, :, :filled] = buffer[:, :, :filled]
    return larger
