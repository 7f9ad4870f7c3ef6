"""The transformers model inside what training puts around it: DDP, FSDP, DeepSpeed, PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP or FSDP wrappers and PEFT adapters."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return cast("PreTrainedModel", getattr(inner, "get_base_model", lambda: inner)())


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder."""
    return unwrapped(model).config.get_text_config()
