"""A run's episodes on disk, each written as it ends, so that a run that was stopped continues.

While the run is under way, its lines are in the order in which episodes ended; when it is complete,
in the order of its seeds. So the file of a run that was stopped and went on is that of one that
never was. ``meta["run"]`` of each episode says what it depends on: a file holds one run, and may be
given more seeds later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.trajectory import Trajectory
from .episodes import Episode
from .journal import Journal, check_run, open_journal, refuse_run

BEGINNING = b'{"messages": ['
_WRITER = "stepagent evaluate or collect"


@contextmanager
def open_episodes(path: Path, run: dict[str, Any], seeds: Sequence[int]) -> Iterator[EpisodeFile]:
    """The file of this run, made where it is missing; on a good end it is in the order of seeds.

    Args:
        path: a regular file, or nothing yet.
        run: all that an episode depends on beside its seed, as JSON can hold it.
        seeds: of all episodes of the run, each once. The file may hold some of them.

    Raises:
        ValueError: where the file holds something else, which stays as it is.
        OSError: where another process writes it.
    """
    with open_journal(path, BEGINNING, _WRITER) as journal:
        episodes = EpisodeFile(journal, run, seeds)
        yield episodes
        episodes.sort()
        if not episodes:
            journal.discard()  # no trajectories can be loaded from it


class EpisodeFile:
    """See `open_episodes`."""

    def __init__(self, journal: Journal, run: dict[str, Any], seeds: Sequence[int]) -> None:
        self._journal = journal
        self._run = {**run, "seeds": describe_seeds(seeds)}
        self._places = {seed: place for place, seed in enumerate(seeds)}
        self._lines: list[tuple[int, int, int]] = []  # seed, start, stop
        self._extended = False  # some lines name fewer seeds than are asked for now
        self.ended: dict[int, Episode] = {}
        """By seed; without those that crashed, which are to be tried again."""
        start = 0
        for where, record, length in journal.records():
            episode = self._check(where, record)
            self._lines.append((episode.seed, start, start := start + length))
            if episode.crashed is None:
                self.ended[episode.seed] = episode

    def __len__(self) -> int:
        return len({seed for seed, *_ in self._lines})

    def append(self, episode: Episode) -> None:
        """Write an episode, unless it has ended before or took no step, which no line can hold."""
        if episode.seed in self.ended or not episode.actions:
            return
        trajectory = episode.trajectory()
        trajectory.meta["run"] = self._run
        start = self._journal.tell()
        self._journal.append([line_of(vars(trajectory))])
        self._lines.append((episode.seed, start, self._journal.tell()))
        if episode.crashed is None:
            self.ended[episode.seed] = episode

    def sort(self) -> None:
        """One line a seed, the latest, in the order of the seeds; in one atomic step."""
        latest = {seed: (start, stop) for seed, start, stop in self._lines}
        order = sorted(latest, key=self._places.__getitem__)
        if order != [seed for seed, *_ in self._lines] or self._extended:
            self._journal.rewrite(self._of_run(*latest[seed]) for seed in order)

    def _of_run(self, start: int, stop: int) -> bytes:
        """The line, which names all seeds of the run."""
        line = self._journal.read(start, stop)
        if not self._extended:
            return line
        record = json.loads(line)
        record["meta"]["run"]["seeds"] = self._run["seeds"]
        return line_of(record)

    def _check(self, where: str, record: Any) -> Episode:
        """The episode of a record, which must be one of this run."""
        try:
            episode = Episode.of(Trajectory(**record))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is no record of {_WRITER}: {error}") from error
        run = record["meta"].get("run")
        if not isinstance(run, dict):
            refuse_run(where, "no word of its run")
        check_run(where, {**run, "seeds": self._run["seeds"]}, self._run)
        if episode.seed not in self._places:
            refuse_run(where, f"seed {episode.seed}, not one of {self._run['seeds']}")
        self._extended |= run.get("seeds") != self._run["seeds"]
        return episode


def line_of(record: dict[str, Any]) -> bytes:
    """A trajectory's line, by its fields."""
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def describe_seeds(seeds: Sequence[int]) -> str:
    """``0-99,200``: what ``--seeds`` takes."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, run)) for run in runs)
