"""A run's episodes on disk, each written as it ends, so that a run that was stopped goes on.

While the run is under way, its lines are in the order in which episodes ended; when it is complete,
in the order of its seeds. So the file of a run that was stopped and went on is that of one that
never was. ``meta["run"]`` of each episode says what it depends on: a file holds one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..data.trajectory import Trajectory
from .episodes import Episode
from .journal import append, exclusive, json_records, whole_lines

_BEGINNING = b'{"messages": ['
_WRITER = "stepagent evaluate or collect"


@contextmanager
def open_episodes(path: Path, run: dict[str, Any], seeds: Sequence[int]) -> Iterator[EpisodeFile]:
    """The file of this run, made where it is missing; on a good end it is in the order of seeds.

    :param run: all that an episode depends on beside its seed, as JSON can hold it.
    :param seeds: of all episodes of the run, each once.
    :raises ValueError: where the file holds something else, which stays as it is.
    :raises OSError: where another process writes it.
    """
    with exclusive(path) as file:
        episodes = EpisodeFile(file, path, run, seeds)
        yield episodes
        episodes.sort()
        if not episodes:
            path.unlink()  # no trajectories can be loaded from it


class EpisodeFile:
    """See :func:`open_episodes`."""

    def __init__(
        self, file: BinaryIO, path: Path, run: dict[str, Any], seeds: Sequence[int]
    ) -> None:
        self._file, self._path = file, path
        self._run = {**run, "seeds": describe_seeds(seeds)}
        self._places = {seed: place for place, seed in enumerate(seeds)}
        self._lines: list[tuple[int, int, int]] = []  # seed, start, stop
        self.ended: dict[int, Episode] = {}
        """By seed; without those that crashed, which are to be tried again."""
        whole = whole_lines(file, path, _BEGINNING, _WRITER)
        file.seek(0)
        start = 0
        for line, (where, record) in zip(file, json_records(path, whole), strict=False):
            episode = self._check(where, record)
            self._lines.append((episode.seed, start, start := start + len(line)))
            if episode.crashed is None:
                self.ended[episode.seed] = episode
        file.truncate(whole)
        file.seek(whole)

    def __len__(self) -> int:
        return len({seed for seed, *_ in self._lines})

    def append(self, episode: Episode) -> None:
        """Write an episode, unless it has ended before or took no step, which no line can hold."""
        if episode.seed in self.ended or not episode.actions:
            return
        trajectory = episode.trajectory()
        trajectory.meta["run"] = self._run
        start = self._file.tell()
        append(self._file, [json.dumps(vars(trajectory), allow_nan=False).encode() + b"\n"])
        self._lines.append((episode.seed, start, self._file.tell()))
        if episode.crashed is None:
            self.ended[episode.seed] = episode

    def sort(self) -> None:
        """One line a seed, the latest, in the order of the seeds; in one atomic step."""
        latest = {seed: (start, stop) for seed, start, stop in self._lines}
        order = sorted(latest, key=self._places.__getitem__)
        if order == [seed for seed, *_ in self._lines]:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                append(file, (self._read(*latest[seed]) for seed in order))
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        return self._file.read(stop - start)

    def _check(self, where: str, record: Any) -> Episode:
        """The episode of a record, which must be one of this run."""
        try:
            episode = Episode.of(Trajectory(**record))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is no record of {_WRITER}: {error}") from error
        run = record["meta"].get("run")
        if not isinstance(run, dict):
            self._refuse(where, "no word of its run")
        for name in self._run | run:
            if run.get(name) != self._run.get(name):
                self._refuse(where, f"{name} {run.get(name)!r}, not {self._run.get(name)!r}")
        if episode.seed not in self._places:
            self._refuse(where, f"seed {episode.seed}, not one of {self._run['seeds']}")
        return episode

    def _refuse(self, where: str, found: str) -> None:
        raise ValueError(
            f"{where} is of another run: it has {found}; write to another file, or delete this one"
        )


def describe_seeds(seeds: Sequence[int]) -> str:
    """``0-99,200``: what ``--seeds`` takes."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, run)) for run in runs)
