"""The layer types of transformers configurations that token trees have masks for."""

from __future__ import annotations

from typing import Any

# And the option that holds the window of each.
LAYER_TYPES = {"full_attention": None, "sliding_attention": "sliding_window"}


def layer_windows(config: Any) -> dict[str, int | None]:
    """The window of each layer type of a transformers configuration, None for full attention."""
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        raise ValueError(
            f"{type(config).__name__} has no layer_types: its layers share one mask, "
            "attention_mask(dtype, window=...)"
        )
    windows = {
        kind: getattr(config, option, None) if option else None
        for kind, option in LAYER_TYPES.items()
    }
    if unknown := sorted(set(layer_types) - LAYER_TYPES.keys()):
        raise ValueError(
            f"layers of {type(config).__name__} must be {' or '.join(LAYER_TYPES)}, got "
            f"{', '.join(unknown)}"
        )
    return {kind: windows[kind] for kind in dict.fromkeys(layer_types)}
