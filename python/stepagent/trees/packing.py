"""Rows into bins under a token budget, and rows over ranks and micro-batches at equal cost."""

from __future__ import annotations

from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .layers import LAYER_TYPES, layer_windows

LARGEST_EXACT = 2**53  # above, float64 does not count every integer


def pack_bins(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Pack items into bins of at most `capacity`: best-fit decreasing, O(n log n).

    The longest item first, each into the fullest bin that still takes it: at most 11/9 of the least
    possible number of bins, plus 4 (Johnson 1974). The same lengths give the same bins.

    Args:
        lengths: (n,) integers in [1, capacity].
        capacity: at least 1.

    Returns:
        The items of each bin, bins in the order in which they were opened, items as they came in.

    Raises:
        ValueError: for a length outside [1, capacity].
        TypeError: where lengths or capacity are not integers.
    """
    array = _numbers("lengths", lengths)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"lengths must hold integers, got dtype {array.dtype}")
    capacity = _integer("capacity", capacity)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    for i in np.flatnonzero(array > capacity)[:1]:  # before uint64 ones become int64
        raise ValueError(f"lengths[{i}] must lie in [1, capacity={capacity}], got {array[i]}")
    return _lists(*_core.pack_bins(array.astype(np.int64), min(capacity, np.iinfo(np.int64).max)))


def balance(costs: ArrayLike, parts: int, *, equal_size: bool = False) -> list[list[int]]:
    """Divide items over parts of about equal cost.

    Karmarkar and Karp's largest differencing method (1982), k-way, O(n k log k) at most. The same
    costs give the same parts: among equal sums the part with more items counts as the larger, then
    that with the higher first item.

    Args:
        costs: (n,) ≥ 0, n ≥ parts, finite as their sum in float64 must be.
        parts: how many, at least 1.
        equal_size: parts hold the same number of items, or one less where ``parts`` does not
            divide n.

    Returns:
        The items of each part, ascending, the part of the largest cost first; none is empty.

    Raises:
        ValueError: for costs or parts that break a rule above, and for integers above 2⁵³.
        TypeError: for other dtypes.
    """
    array = _numbers("costs", costs)
    if array.dtype.kind not in "iuf" and array.size:
        raise TypeError(f"costs must hold numbers, got dtype {array.dtype}")
    if array.dtype.kind in "iu":
        for i in np.flatnonzero(array > LARGEST_EXACT)[:1]:
            raise ValueError(f"costs[{i}] must be at most {LARGEST_EXACT}, got {array[i]}")
    parts = _integer("parts", parts)
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    return _lists(*_core.balance(array.astype(np.float64), parts, equal_size))


def train_flops(lengths: ArrayLike, config: Any) -> NDArray[np.float64]:
    """Floating-point operations of a forward and a backward pass over rows of these lengths, (n,).

    Per layer, with L tokens, h = hidden_size, i = intermediate_size, q and k = heads × head_dim of
    queries and of keys or values, and w the layer's window (L where it has none)::

        6 (h (2 q + 2 k) + 3 h i) L  +  12 q pairs,     pairs = L m − m² / 2,  m = min(L, w)

    6 = 2 (a multiplication and an addition) × 3 (forward, and backward at twice its price); 3 h i
    is a gated MLP, h (2 q + 2 k) the four projections; pairs are those that a causal mask shows,
    each in two products, QKᵀ and AV (Kaplan et al. 2020, Narayanan et al. 2021). With full
    attention that is a L + b L². In mixtures of experts i counts num_experts_per_tok times. The
    head is left out: it runs on scored rows alone; so are norms, embeddings and routers.

    Args:
        lengths: (n,) integers ≥ 0.
        config: a transformers configuration of a decoder.

    Returns:
        (n,) float64.

    Raises:
        ValueError: for layers that are not attention, for multi-head latent attention, and for
            lengths below 0.
    """
    array = _numbers("lengths", lengths)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"lengths must hold integers, got dtype {array.dtype}")
    for i in np.flatnonzero(array < 0)[:1]:
        raise ValueError(f"lengths[{i}] must be at least 0, got {array[i]}")
    config = config.get_text_config()
    _check_countable(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = heads * head_dim
    k = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    weights = config.hidden_size * (2 * q + 2 * k + 3 * _intermediate_size(config))
    tokens = array.astype(np.float64)
    flops = np.zeros_like(tokens)
    for window in _windows(config):
        seen = tokens if window is None else np.minimum(tokens, window)
        flops += 6 * weights * tokens + 12 * q * (tokens * seen - seen**2 / 2)
    return flops


def _check_countable(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(kinds - LAYER_TYPES.keys()):
        raise ValueError(
            f"layers of {type(config).__name__} must be attention, got {', '.join(unknown)}"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{type(config).__name__} must have keys per head, got multi-head latent attention"
        )


def _intermediate_size(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return int(config.intermediate_size)
    return int(experts * (getattr(config, "moe_intermediate_size", 0) or config.intermediate_size))


def _windows(config: Any) -> list[int | None]:
    """Each layer's window, None for full attention."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if kinds := getattr(config, "layer_types", None):
        windows = layer_windows(config)
        return [window and windows[kind] for kind in kinds]
    return [window] * int(config.num_hidden_layers)


def _numbers(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    return array


def _integer(name: str, value: int) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _lists(items: NDArray[np.int64], offsets: NDArray[np.int64]) -> list[list[int]]:
    flat, bounds = items.tolist(), offsets.tolist()
    return [flat[start:stop] for start, stop in pairwise(bounds)]
