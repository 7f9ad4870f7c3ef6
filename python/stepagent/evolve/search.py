"""The search: propose, play pairs on fresh seeds, keep what is surely better, and go on from there.

    DFS(p):  for up to ``children`` proposals c in place of p:
                 if the lower end of payoff(c) − payoff(p), paired, is above 0:  return DFS(c)
             return p

That is Agent-Pro's search (arXiv 2402.17574) with another test: no episode decides twice. Each
comparison has seeds of its own, on which both guidelines play, and those of the held-out episodes
decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .. import envs as environments
from ..acting.policies import Policy
from ..acting.rollout import run_episodes
from ..data.draws import check_count
from ..envs.base import check_seeds
from ..envs.pool import EnvFactory
from ..evaluation.metrics import METRICS
from ..evaluation.sign_flips import sign_flip_interval
from ..records.episode_file import describe_seeds
from ..records.episodes import Episode
from .journal import Proposal, SearchFile, records_of
from .proposers import Garbage, NoMoreProposals, Proposer, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

Payoff = Literal["reward", "success", "progress_rate"]
SHOWN = 8  # failed episodes, to a proposer
_CRASHED = 0.1  # of a comparison's pairs: with more, what is left says little


@dataclass(frozen=True)
class Caps:
    """Where a search ends, if it has not before; a search goes on where they are raised.

    Attributes:
        depth: accepted proposals.
        proposals: asked for, usable or not.
        episodes: of the root and of comparisons; the held-out ones come on top. None: any number.
    """

    depth: int = 10
    proposals: int = 100
    episodes: int | None = None

    def __post_init__(self) -> None:
        check_count("depth", self.depth)
        check_count("proposals", self.proposals)
        if self.episodes is not None:
            check_count("episodes of caps", self.episodes)


@dataclass(frozen=True)
class Arena:
    """How a guideline is played, and what its payoff is.

    Attributes:
        env: as `stepagent.rollout.run_episodes` takes it.
        policy: makes the policy that follows a guideline; ValueError for one that it cannot follow.
        options: further ones of `run_episodes`.
    """

    env: str | EnvFactory
    policy: Callable[[str], Policy]
    payoff: Payoff = "reward"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.payoff not in get_args(Payoff):
            choices = ", ".join(get_args(Payoff))
            raise ValueError(f"payoff must be one of {choices}, got {self.payoff!r}")

    def play(self, guideline: str, seeds: Sequence[int], label: str | None) -> list[Episode]:
        """An episode of each seed."""
        policy = self.policy(guideline)
        return run_episodes(self.env, policy, seeds, progress=label, **self.options)

    def paid(self, episode: Episode) -> float | None:
        """None of an episode that crashed; 0 of one that ended before a step."""
        if episode.crashed is not None:
            return None
        value = METRICS[self.payoff](episode)
        return 0.0 if value is None else value

    def pairs(self, ours: Sequence[Episode], theirs: Sequence[Episode]) -> NDArray[np.float64]:
        """(n, 2): the payoffs of the pairs of episodes that both ended."""
        paid = [(self.paid(a), self.paid(b)) for a, b in zip(ours, theirs, strict=True)]
        ended = [(a, b) for a, b in paid if a is not None and b is not None]
        return np.array(ended, dtype=np.float64).reshape(-1, 2)

    def lacks(self, seeds: Sequence[int]) -> str | None:
        """Why the environment has no episodes of these seeds; None where it may have them."""
        make = environments.factory(self.env) if isinstance(self.env, str) else self.env
        with closing(make()) as env:
            try:
                check_seeds(env, seeds)
            except ValueError as error:
                return f"no more seeds: {error}"
        return None


class Search:
    """A search on its way; what it knows is what its file says.

    Args:
        file: of `stepagent.evolve.journal.open_search`.
        episodes: of each guideline in a comparison.
        held_out: of each accepted guideline, to tell how good it is; 0: none.
        children: proposals in a row that are not accepted, after which it ends.
        seed_start: the first seed; the held-out ones come first, then those of the root, then those
            of one comparison after the other.
        label: of progress bars on stderr; None: no bars.
    """

    def __init__(
        self,
        file: SearchFile,
        arena: Arena,
        propose: Proposer,
        *,
        episodes: int,
        held_out: int,
        children: int,
        seed_start: int,
        label: str | None = None,
    ) -> None:
        self._file, self._arena, self._propose = file, arena, propose
        self._episodes, self._held_out, self._children = episodes, held_out, children
        self._seed_start, self._label = seed_start, label

    # -------------------------------------------------------------- what the file says

    @property
    def path(self) -> list[Proposal]:
        """The root and the accepted proposals, each in place of the one before it."""
        return [one for one in self._file.proposals if one.accepted]

    @property
    def spent(self) -> int:
        """Episodes of the root and of comparisons."""
        judged = sum(one.judged for one in self._file.proposals)
        return self._episodes * (2 * judged - 1) if judged else 0

    def ended(self, caps: Caps) -> str | None:
        """Why the search ends here; None where it goes on."""
        number, depth = len(self._file.proposals) - 1, len(self.path) - 1
        if self._file.proposals[-1].outcome == "open":
            return None
        if depth >= caps.depth:
            return f"{depth} accepted, the depth that was allowed"
        if number - self.path[-1].number >= self._children:
            return f"{self._children} proposals in a row were not accepted"
        if number >= caps.proposals:
            return f"{number} proposals, as many as were allowed"
        if caps.episodes is not None and self.spent + 2 * self._episodes > caps.episodes:
            return f"{self.spent} episodes, and no more comparison within {caps.episodes}"
        return None

    # -------------------------------------------------------------- what it does

    def run(self, guideline: str, caps: Caps) -> str:
        """Go on to the end, then play the held-out episodes; why it ended."""
        if not self._file.proposals:
            self._play_root(guideline)
        while (reason := self.ended(caps)) is None:
            last = self._file.proposals[-1]
            if last.outcome != "open":  # or it was proposed, and then the search was stopped
                try:
                    self._ask()
                except NoMoreProposals as error:
                    reason = str(error)
                    break
                continue
            seeds = self._seeds(sum(one.judged for one in self._file.proposals))
            if (reason := self._arena.lacks(seeds)) is not None:
                break
            self._judge(last, seeds)
        self._hold_out()
        return reason

    def _play_root(self, guideline: str) -> None:
        seeds = self._seeds(0)
        played = self._arena.play(guideline, seeds, self._bar("root"))
        paid = [value for one in played if (value := self._arena.paid(one)) is not None]
        if not paid:
            raise RuntimeError(f"all {len(played)} episodes of the first guideline crashed")
        self._file.write(
            "root",
            guideline=guideline,
            seeds=describe_seeds(seeds),
            payoff=float(np.mean(paid)),
            failed=_failed(played),
        )

    def _ask(self) -> None:
        proposals, current = self._file.proposals, self.path[-1]
        refused = [
            (one.text, one.difference.mean)
            for one in proposals
            if one.parent == current.number and one.text is not None and one.difference is not None
            if not one.accepted
        ]
        number = len(proposals)
        assert current.text is not None
        text, problem = self._answer(Request(current.text, current.failed, refused, number))
        told = {"number": number, "parent": current.number, "guideline": text}
        self._file.write("proposed", **told, problem=problem)

    def _answer(self, request: Request) -> tuple[str | None, str | None]:
        """What the proposer says, and why it is of no use; nothing that it does ends the search."""
        try:
            text: object = self._propose(request)
        except NoMoreProposals:
            raise
        except Garbage as error:
            return None, f"garbage: {error}"
        except Exception as error:  # whatever others' code or another machine does
            return None, f"the proposer failed: {type(error).__name__}: {error}"
        if text is None or text == "":
            return None, "nothing"
        if not isinstance(text, str) or not text.strip():
            return None, f"garbage: a guideline must be a text, got {text!r}"
        for one in self._file.proposals:
            if one.text is not None and one.text.strip() == text.strip():
                return text, f"the same as {f'number {one.number}' if one.number else 'the root'}"
        try:
            self._arena.policy(text)
        except ValueError as error:
            return text, f"garbage: {error}"
        return text, None

    def _judge(self, proposal: Proposal, seeds: range) -> None:
        """Play it against its parent on seeds that decide this and nothing else."""
        assert proposal.text is not None
        assert proposal.parent is not None
        parent = self._file.proposals[proposal.parent].text
        assert parent is not None
        label = f"proposal {proposal.number}"
        ours = self._arena.play(proposal.text, seeds, self._bar(label))
        theirs = self._arena.play(parent, seeds, self._bar(f"{label}, parent"))
        paid = [
            (self._arena.paid(a), self._arena.paid(b)) for a, b in zip(ours, theirs, strict=True)
        ]
        pairs = np.array([(a, b) for a, b in paid if a is not None and b is not None])
        crashed = len(seeds) - len(pairs)
        sound = crashed <= _CRASHED * len(seeds)
        found = sign_flip_interval(pairs[:, 0] - pairs[:, 1]) if sound else None
        accepted = found is not None and found.low is not None and found.low > 0
        self._file.write(
            "judged",
            number=proposal.number,
            seeds=describe_seeds(seeds),
            pairs=len(pairs),
            crashed=crashed,
            difference=None if found is None else vars(found),
            payoff=float(pairs[:, 0].mean()) if sound else None,
            parent_payoff=float(pairs[:, 1].mean()) if sound else None,
            accepted=accepted,
            failed=_failed(ours) if accepted else [],
        )

    def _hold_out(self) -> None:
        """Play the held-out seeds by what was accepted, once."""
        seeds = range(self._seed_start, self._seed_start + self._held_out)
        for one in self.path:
            if not seeds or one.payoffs:
                continue
            assert one.text is not None
            played = self._arena.play(one.text, seeds, self._bar(f"held out, {one.number}"))
            paid = [self._arena.paid(episode) for episode in played]
            told = {"number": one.number, "seeds": describe_seeds(seeds)}
            self._file.write("held out", **told, payoffs=paid)

    def _seeds(self, block: int) -> range:
        """Of the root, block 0, or of a comparison."""
        start = self._seed_start + self._held_out + block * self._episodes
        return range(start, start + self._episodes)

    def _bar(self, what: str) -> str | None:
        return None if self._label is None else f"{self._label}: {what}"


def _failed(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """As a proposer is shown them, for the file."""
    failed = [e for e in episodes if e.crashed is None and not e.success and e.actions]
    return records_of(failed[:SHOWN])
