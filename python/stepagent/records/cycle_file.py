"""The episodes that an agent acted in while it was trained: one file, cycle after cycle.

A line is an episode's record with its cycle in ``meta["cycle"]``. A cycle is written where it
begins, before anything is learnt from it. So a run that goes on from a checkpoint makes anew what
comes after that: those cycles are written again, in place of what stood there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .episode_file import BEGINNING, line_of
from .episodes import Episode
from .journal import open_journal

ROLLOUTS = "rollouts.jsonl"  # in a run's folder
_WRITER = "training with save_rollouts"


def write_cycle(path: Path, cycle: int, episodes: Sequence[Episode]) -> None:
    """Put a cycle's episodes behind those of the cycles before it, and drop all that follows.

    Episodes that took no step have no line.

    Raises:
        ValueError: where the file holds something else, which stays as it is.
        OSError: where another process writes it.
    """
    lines = []
    for episode in episodes:
        if episode.actions:
            trajectory = episode.trajectory()
            trajectory.meta["cycle"] = cycle
            lines.append(line_of(vars(trajectory)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_journal(path, BEGINNING, _WRITER) as journal:
        kept = size = 0
        for where, record, length in journal.records():
            size += length
            if _cycle_of(where, record) < cycle:
                kept = size
        if kept == size:
            journal.append(lines)
        else:
            journal.rewrite([journal.read(0, kept), *lines])
        journal.discard()


def _cycle_of(where: str, record: Any) -> int:
    meta = record.get("meta") if isinstance(record, dict) else None
    found = meta.get("cycle") if isinstance(meta, dict) else None
    if type(found) is not int:
        raise ValueError(
            f"{where} must be a line of {_WRITER}, with its cycle, got cycle {found!r}"
        )
    return found
