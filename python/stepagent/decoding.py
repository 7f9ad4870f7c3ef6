"""Decoding many branches in lock-step on one key-value cache.

Key: B rows of the batch, Q new tokens of a row, S cache slots, H hidden, V vocabulary, R rows.

A slot of the cache belongs to one token. Which slots a new token may see is given token by token,
so one cache holds a trunk and every branch that grows from it, or rows of unequal length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .attention import attention_masks, dense_attention
from .models import hidden_states

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import LogitsProcessor, PreTrainedModel


class SlotCache:
    """A key-value cache whose slots carry their depth; what a token sees is the caller's to say.

    :param slots: room for so many slots a row from the start; it grows where more come.
    """

    def __init__(self, model: PreTrainedModel, rows: int, slots: int = 0) -> None:
        from transformers.cache_utils import Cache

        from .slot_layer import SlotLayer

        self._model = model
        # Every layer keeps all slots: windows are applied by depth in the mask, because slots of
        # different branches are not in the order of their depth.
        make_layer: Any = functools.partial(SlotLayer, slots)
        self._cache = Cache(layer_class_to_replicate=make_layer)
        self._depths = torch.zeros((rows, 0), dtype=torch.long, device=model.device)

    @property
    def slots(self) -> int:
        """How many slots of each row are filled."""
        return self._depths.shape[1]

    def prefill(self, tokens_BQ: Tensor) -> Tensor:
        """Append the next tokens of plain sequences; their hidden states (B, Q, H).

        Each sees those before it, by the model's own causal attention: faster than a mask that
        says the same.
        """
        end = self.slots + tokens_BQ.shape[1]
        depths_BQ = torch.arange(self.slots, end, device=tokens_BQ.device).expand_as(tokens_BQ)
        return self._append(tokens_BQ, depths_BQ)

    def extend(self, tokens_BQ: Tensor, depths_BQ: Tensor, visible_BQS: Tensor) -> Tensor:
        """Append tokens and return their hidden states (B, Q, H).

        :param visible_BQS: bool over all slots, the Q new ones last. Every token must see a slot.
        """
        depths_BS = torch.cat([self._depths, depths_BQ], dim=1)
        masks = attention_masks(self._model, visible_BQS, depths_BQ, depths_BS)
        return self._append(tokens_BQ, depths_BQ, masks)

    def _append(
        self,
        tokens_BQ: Tensor,
        depths_BQ: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
    ) -> Tensor:
        self._depths = torch.cat([self._depths, depths_BQ], dim=1)
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
            self._depths = self._depths[:, :slots]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._cache.batch_select_indices(rows)
        self._depths = self._depths[rows]


def sample_tokens(
    logits_RV: Tensor,
    temperature: float,
    uniforms_R: NDArray[np.float64],
    truncations: Sequence[LogitsProcessor] = (),
) -> Tensor:
    """One token a row: the argmax at temperature 0, else by inverting the softmax's cumulative sum.

    :param uniforms_R: in [0, 1). All is computed in float64, so a token of probability p is drawn
        for a set of uniforms of measure p to 1e-12.
    :param truncations: as :func:`make_truncations` gives them; the argmax is always kept.
    :raises FloatingPointError: where a row has no finite maximum: NaN or infinity in the model.
    """
    if not bool(torch.isfinite(logits_RV.amax(dim=-1)).all()):
        raise FloatingPointError(
            "the model's logits hold NaN or infinity; look for a broken weight"
        )
    if temperature == 0:
        return logits_RV.argmax(dim=-1)
    scores = logits_RV.double() / temperature
    for truncate in truncations:
        scores = truncate(None, scores)  # they do not look at the tokens so far
    cumulative = torch.softmax(scores, dim=-1).cumsum(dim=-1)
    thresholds = torch.from_numpy(uniforms_R).to(cumulative.device) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, thresholds.unsqueeze(1), right=True).squeeze(1)
    return tokens.clamp_(max=logits_RV.shape[1] - 1)


def make_truncations(
    top_k: int | None, top_p: float | None, min_p: float | None
) -> list[LogitsProcessor]:
    """transformers' own truncations of the distribution, in the order of ``generate``.

    :raises ValueError: for a value out of range.
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


def check_count(name: str, value: int) -> None:
    """Raise unless ``value`` is a whole number and at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def check_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is finite and not negative."""
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")


def uniforms(seed: int, *keys: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) that depend on ``seed`` and the integer ``keys`` alone.

    A counter-based generator (the finaliser of SplitMix64, Steele et al. 2014, over the keys in
    turn): the number for (trunk, step, sample, token) is the same whatever else is in the batch.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, dtype=np.int64).astype(np.uint64))
        for key in keys:
            state = _mix(state ^ _mix(np.asarray(key, dtype=np.int64).astype(np.uint64)))
    return np.asarray(state >> np.uint64(11), dtype=np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
