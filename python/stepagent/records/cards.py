"""What model cards and dataset cards have in common: who wrote one, and how values are shown."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

MARKER = "<!-- Written by stepagent. Delete this line to keep your own changes to the card. -->"


def is_a_persons(card: Path) -> bool:
    """Whether there is a card without the line that says who wrote it."""
    return card.is_file() and MARKER.encode() not in card.read_bytes()


def table(values: Mapping[str, Any]) -> str:
    """As Markdown, a line a value."""
    lines = [f"| `{name}` | {_shown(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else "None."


def plain(value: Any) -> Any:
    """An enumeration's own value."""
    return value.value if isinstance(value, Enum) else value


def _shown(value: Any) -> str:
    value = plain(value)
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
