"""One episode, and files of them.

The public name of `stepagent.records.episodes`.
"""

from .records.episodes import (
    Episode,
    load_episodes,
)

__all__ = [
    "Episode",
    "load_episodes",
]
