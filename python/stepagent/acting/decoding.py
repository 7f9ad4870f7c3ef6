"""Decoding many branches in lock-step on one key-value cache.

Key: B rows of the batch, Q new tokens of a row, S cache slots, H hidden, V vocabulary, R rows, K
weights of a row.

A slot of the cache belongs to one token. Which slots a new token may see is given token by token,
so one cache holds a trunk and every branch that grows from it, or rows of unequal length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.draws import check_count
from ..models import hidden_states
from ..models.attention import attention_masks, dense_attention
from .grouped_attention import grouped_attention, query_groups

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel

    from ..data.trunk import Trunk

# Entries of the vocabulary whose probabilities are summed first when a token is sampled.
_BLOCK = 512


class SlotCache:
    """A key-value cache whose slots carry their depth; what a token sees is the caller's to say.

    Args:
        slots: room for so many slots a row from the start; it grows where more come.
    """

    def __init__(self, model: PreTrainedModel, rows: int, slots: int = 0) -> None:
        from transformers.cache_utils import Cache

        from .slot_layer import SlotLayer

        self._model = model
        # Every layer keeps all slots: windows are applied by depth in the mask, because slots of
        # different branches are not in the order of their depth.
        make_layer: Any = functools.partial(SlotLayer, slots)
        self._cache = Cache(layer_class_to_replicate=make_layer)
        self._depths = torch.zeros((rows, slots), dtype=torch.long, device=model.device)
        self._slots = 0

    @property
    def slots(self) -> int:
        """How many slots of each row are filled."""
        return self._slots

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._depths)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._depths.device

    def prefill(self, tokens_BQ: Tensor) -> Tensor:
        """Append the next tokens of plain sequences; their hidden states (B, Q, H).

        Each sees those before it, by the model's own causal attention: faster than a mask that
        says the same.
        """
        end = self.slots + tokens_BQ.shape[1]
        depths_BQ = torch.arange(self.slots, end, device=tokens_BQ.device).expand_as(tokens_BQ)
        self._append(depths_BQ)
        return self._forward(tokens_BQ, depths_BQ, None)

    def read_trunks(self, trunks: Sequence[Trunk], stop: int) -> Tensor:
        """Append the next tokens of trunks, one a row, those before the place ``stop``; their
        hidden states (B, Q, H).

        A slot is a token's place in its trunk. Behind a trunk's end come tokens that it never sees.
        """
        first = self.slots
        tokens_BQ = self._of_trunks(trunks, "input_ids", stop, 0)[:, first:]
        if all(not len(trunk.rewinds) for trunk in trunks):
            return self.prefill(tokens_BQ)
        depths_BQ = self._of_trunks(trunks, "position_ids", stop, 0)[:, first:]
        ends_BS = self._of_trunks(trunks, "subtree_end", stop, stop)
        slot_S = torch.arange(stop, device=self.device)
        place_Q = slot_S[first:, None]
        visible_BQS = (slot_S <= place_Q) & (place_Q < ends_BS[:, None])
        return self.extend(tokens_BQ, depths_BQ, visible_BQS)

    def _of_trunks(self, trunks: Sequence[Trunk], name: str, width: int, fill: int) -> Tensor:
        arrays = [getattr(trunk, name)[:width] for trunk in trunks]
        padded = [np.pad(a, (0, width - len(a)), constant_values=fill) for a in arrays]
        host = torch.from_numpy(np.stack(padded).astype(np.int64))
        if self.device.type == "cuda":
            host = host.pin_memory()  # or the host would wait for the copy
        return host.to(self.device, non_blocking=True)

    def extend(self, tokens_BQ: Tensor, depths_BQ: Tensor, visible_BQS: Tensor) -> Tensor:
        """Append tokens and return their hidden states (B, Q, H).

        Args:
            visible_BQS: bool over all slots, the Q new ones last. Every token must see a slot.
        """
        depths_BS = self._append(depths_BQ)
        masks = attention_masks(self._model, visible_BQS, depths_BQ, depths_BS)
        return self._forward(tokens_BQ, depths_BQ, masks)

    def write(
        self, tokens_BQ: Tensor, depths_BQ: Tensor, visible_BQS: Tensor, slots_Q: Tensor
    ) -> Tensor:
        """Write tokens into the slots ``slots_Q``; their hidden states (B, Q, H).

        As `extend`, but in shapes that do not depend on how many slots are filled, so that a
        CUDA graph of it can be replayed. ``slots`` stays what it was.

        Args:
            visible_BQS: bool over the whole room of the cache.
        """
        self._depths.index_copy_(1, slots_Q, depths_BQ)
        with dense_attention(self._model), self._written_at(slots_Q):
            groups = query_groups(self._model)
            visible, depths = visible_BQS.repeat(1, groups, 1), depths_BQ.repeat(1, groups)
            masks = attention_masks(self._model, visible, depths, self._depths)
            with grouped_attention(self._model, groups):
                return self._forward(tokens_BQ, depths_BQ, masks)

    @contextmanager
    def _written_at(self, slots_Q: Tensor) -> Iterator[None]:
        layers: Any = self._cache.layers
        for layer in layers:
            layer.at = slots_Q
        try:
            yield
        finally:
            for layer in layers:
                layer.at = None

    def _append(self, depths_BQ: Tensor) -> Tensor:
        """Take note of new slots; the depths (B, S) of all."""
        start, end = self._slots, self._slots + depths_BQ.shape[1]
        if end > self._depths.shape[1]:
            self._depths = nn.functional.pad(self._depths, (0, end - self._depths.shape[1]))
        self._depths[:, start:end] = depths_BQ
        self._slots = end
        return self._depths[:, :end]

    def _forward(
        self,
        tokens_BQ: Tensor,
        depths_BQ: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
    ) -> Tensor:
        with dense_attention(self._model):
            return hidden_states(
                self._model,
                input_ids=tokens_BQ,
                position_ids=depths_BQ,
                attention_mask=attention_mask,
                past_key_values=self._cache,
                use_cache=True,
            )

    def truncate(self, slots: int) -> None:
        """Forget all but the first ``slots`` of each row."""
        if slots < self.slots:
            self._cache.crop(slots - self.slots)
            self._slots = slots

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._cache.batch_select_indices(rows)
        self._depths = self._depths[rows]


def finite_rows(logits_RV: Tensor) -> Tensor:
    """(R,) bool: the row has a finite maximum, so no NaN and no infinity that counts."""
    return torch.isfinite(logits_RV.amax(dim=-1))


def check_finite(finite: bool) -> None:
    """Raise FloatingPointError unless all rows that were sampled from were finite."""
    if not finite:
        raise FloatingPointError(
            "the model's logits must be finite, got NaN or infinity: look for a broken weight"
        )


def sample_tokens(
    logits_RV: Tensor,
    temperature: float,
    uniforms_R: Tensor,
    truncations: Sequence[LogitsProcessor] = (),
) -> Tensor:
    """One token a row: the argmax at temperature 0, else by inverting the softmax's cumulative sum.

    The host is asked nothing. A row that is not finite (`finite_rows`) gives any token.

    Args:
        uniforms_R: in [0, 1), float64. All is computed in float64, so a token of probability p is
            drawn for a set of uniforms of measure p to 1e-12.
        truncations: as `make_truncations` gives them; the argmax is always kept.
    """
    if temperature == 0:
        return logits_RV.argmax(dim=-1)
    scores = logits_RV.double() / temperature
    for truncate in truncations:
        scores = truncate(None, scores)  # they do not look at the tokens so far
    # First the block of the vocabulary, then the token in it: only sums are needed of the others.
    R, V = scores.shape
    weights = scores.new_zeros((R, -(-V // _BLOCK), _BLOCK))
    torch.exp(scores - scores.amax(dim=-1, keepdim=True), out=weights.view(R, -1)[:, :V])
    sums = weights.sum(dim=-1)
    block, rest = _invert(sums, uniforms_R * sums.sum(dim=-1))
    within = weights.gather(1, block.view(R, 1, 1).expand(R, 1, _BLOCK)).squeeze(1)
    token, _ = _invert(within, rest)
    return (block * _BLOCK + token).clamp_(max=V - 1)  # NaN may have led to the padding


def _invert(weights_RK: Tensor, thresholds_R: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum passes the threshold, always at a positive weight; what is left."""
    cumulative = weights_RK.cumsum(dim=-1)
    # Sums of the same numbers in another order may differ in the last bit.
    last = torch.nextafter(cumulative[:, -1], torch.zeros_like(thresholds_R))
    thresholds = thresholds_R.clamp(min=0).minimum(last).unsqueeze(1)
    index = torch.searchsorted(cumulative, thresholds, right=True)
    index.clamp_(max=weights_RK.shape[1] - 1)  # of a row with NaN
    before = cumulative.gather(1, index) - weights_RK.gather(1, index)
    return index.squeeze(1), (thresholds - before).squeeze(1)


def make_truncations(
    top_k: int | None, top_p: float | None, min_p: float | None
) -> list[LogitsProcessor]:
    """transformers' own truncations of the distribution, in the order of ``generate``.

    Raises:
        ValueError: for a value out of range.
    """
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    truncations: list[LogitsProcessor] = []
    if top_k is not None:
        check_count("top_k", top_k)
        truncations.append(TopKLogitsWarper(int(top_k)))
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be > 0 and <= 1, got {top_p}")
        truncations.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be >= 0 and <= 1, got {min_p}")
        truncations.append(MinPLogitsWarper(min_p))
    return truncations
