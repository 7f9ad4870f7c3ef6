"""Attention of many new tokens to a long cache whose heads are shared by groups of query heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..models.wrappers import text_config

_NAME = "stepagent_grouped"


def query_groups(model: nn.Module) -> int:
    """How many query heads read a key head where `grouped_attention` can make it one."""
    config = text_config(model)
    if config._attn_implementation != "sdpa":
        return 1
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


@contextmanager
def grouped_attention(model: nn.Module, groups: int) -> Iterator[None]:
    """Inside, the G heads of a group are more queries of one head, under masks (B, 1, G·Q, S).

    Under a mask transformers' ``sdpa`` copies keys and values for each query head, which at every
    token moves several times the cache.
    """
    if groups == 1:
        yield
        return
    from transformers import AttentionInterface

    config = text_config(model)
    before = config._attn_implementation
    AttentionInterface.register(_NAME, _attend)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(B, heads, Q, D) of ``query`` to (B, Q, heads, D)."""
    packed = query.reshape(*key.shape[:2], -1, query.shape[-1])
    out = functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    out = out.reshape(*query.shape[:3], value.shape[-1])
    return out.transpose(1, 2).contiguous(), None
