"""A search on disk: what was proposed and what came of it, one JSON line each, in order.

The state of a search is what its lines say and nothing else, so a search that was stopped goes on
from its last line.

    {"event": "root", "run": {…}, "guideline", "seeds", "payoff", "failed": […]}
    {"event": "proposed", "number", "parent", "guideline", "problem"}   problem: null, or why not
    {"event": "judged", "number", "seeds", "pairs", "crashed", "difference": {mean, low, high},
     "payoff", "parent_payoff", "accepted", "failed"}
    {"event": "held out", "number", "seeds", "payoffs"}                 number 0 is the root
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.trajectory import Trajectory
from ..evaluation import Interval
from ..records.episodes import Episode
from ..records.journal import Journal, check_run, open_journal, refuse_run

BEGINNING = b'{"event": "'
_WRITER = "stepagent evolve"
_EVENTS = ("root", "proposed", "judged", "held out")


@dataclass
class Proposal:
    """A guideline in a search; number 0 is the one that it began with.

    Attributes:
        parent: the number of the guideline in whose place it was proposed; None of the root's.
        text: None where the proposer gave none.
        problem: why it could not be judged; None where it could.
        difference: of its payoff and its parent's, over the pairs of episodes that ended.
        payoffs: of the held-out episodes, by seed; empty where it is not on the accepted path.
    """

    number: int
    parent: int | None
    text: str | None
    problem: str | None = None
    seeds: str | None = None
    pairs: int = 0
    crashed: int = 0
    difference: Interval | None = None
    payoff: float | None = None
    parent_payoff: float | None = None
    accepted: bool = False
    failed: list[Episode] = field(default_factory=list)
    payoffs: list[float | None] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether it was played against its parent."""
        return self.seeds is not None

    @property
    def outcome(self) -> str:
        """In a word: accepted, refused, crashed, unusable, or open."""
        if self.problem is not None:
            return "unusable"
        if not self.judged:
            return "open"
        if self.difference is None:
            return "crashed"
        return "accepted" if self.accepted else "refused"


class SearchFile:
    """See `open_search`."""

    def __init__(self, journal: Journal, run: dict[str, Any]) -> None:
        self._journal, self._run = journal, run
        self.proposals: list[Proposal] = []
        for where, record, _ in journal.records():
            self._read(where, record)

    def write(self, event: str, **told: Any) -> None:
        """Add a line, which is on the disk on return; its proposal is up to date."""
        record = {"event": event, **({"run": self._run} if event == "root" else {}), **told}
        line = json.dumps(record, allow_nan=False)
        self._journal.append([line.encode() + b"\n"])
        self._read(str(self._journal.path), json.loads(line))

    def _read(self, where: str, record: Any) -> None:
        if not isinstance(record, dict) or record.get("event") not in _EVENTS:
            raise ValueError(f"{where} is no record of {_WRITER}: {str(record)[:80]}")
        try:
            self._apply(where, record)
        except (KeyError, IndexError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where} is no record of {_WRITER}: {what}") from error

    def _apply(self, where: str, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == "root":
            check_run(where, record["run"], self._run)
            root = Proposal(0, None, record["guideline"], accepted=True, seeds=record["seeds"])
            root.payoff, root.failed = record["payoff"], episodes_of(record["failed"])
            self.proposals = [root]
            return
        if not self.proposals:
            refuse_run(where, "no word of its run")
        if event == "proposed":
            told = {name: record[name] for name in ("number", "parent", "problem")}
            self.proposals.append(Proposal(text=record["guideline"], **told))
            return
        proposal = self.proposals[record["number"]]
        if event == "held out":
            proposal.payoffs = list(record["payoffs"])
            return
        for name in ("seeds", "pairs", "crashed", "payoff", "parent_payoff", "accepted"):
            setattr(proposal, name, record[name])
        found = record["difference"]
        proposal.difference = None if found is None else Interval(**found)
        proposal.failed = episodes_of(record["failed"])


@contextmanager
def open_search(path: Path, run: dict[str, Any]) -> Iterator[SearchFile]:
    """The journal of this search, made where it is missing.

    Args:
        path: a regular file, or nothing yet.
        run: all that its episodes and decisions depend on, as JSON can hold it.

    Raises:
        ValueError: where the file holds something else, which stays as it is.
        OSError: where another process writes it.
    """
    with open_journal(path, BEGINNING, _WRITER) as journal:
        yield SearchFile(journal, run)


def records_of(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """As JSON, without token ids."""
    bare = [replace(e, trunk=None, logps=[], overruled=[], made_with={}) for e in episodes]
    return [vars(episode.trajectory()) for episode in bare]


def episodes_of(records: Sequence[dict[str, Any]]) -> list[Episode]:
    """The inverse of `records_of`."""
    return [Episode.of(Trajectory(**record)) for record in records]
