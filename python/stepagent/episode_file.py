"""A file that episodes are appended to as they end.

The public name of `stepagent.records.episode_file`.
"""

from .records.episode_file import (
    EpisodeFile,
    describe_seeds,
    open_episodes,
)

__all__ = [
    "EpisodeFile",
    "describe_seeds",
    "open_episodes",
]
