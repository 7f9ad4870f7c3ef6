"""Search over an agent's policy text, where the agent itself cannot be trained.

``search.py`` is the search, ``journal.py`` its file, ``proposers.py`` who proposes, and
``blackjack.py`` a game at which all of it runs without a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.draws import check_count
from ..envs import shown_name
from ..evaluation.sign_flips import sign_flip_interval
from ..files import write_text
from .journal import Proposal, open_search
from .proposers import (
    FileProposer,
    Garbage,
    NoMoreProposals,
    Proposer,
    Request,
    ServerProposer,
)
from .search import Arena, Caps, Payoff, Search

if TYPE_CHECKING:
    from ..acting.policies import Policy
    from ..envs.pool import EnvFactory
    from ..evaluation import Interval

__all__ = [
    "Caps",
    "Evolved",
    "FileProposer",
    "Garbage",
    "NoMoreProposals",
    "Proposal",
    "Proposer",
    "Request",
    "ServerProposer",
    "evolve",
    "told",
]


@dataclass(frozen=True)
class Evolved:
    """What came of a search.

    Attributes:
        proposals: in order, number 0 being the guideline that it began with.
        episodes: played by the root and in comparisons.
        reason: why it ended.
    """

    proposals: list[Proposal]
    episodes: int
    reason: str

    @property
    def path(self) -> list[Proposal]:
        """The root and the accepted proposals, each in place of the one before it."""
        return [one for one in self.proposals if one.accepted]

    @property
    def guideline(self) -> str:
        """The last that was accepted, or the one that it began with."""
        return self.path[-1].text or ""

    def held_out(self, number: int, against: int | None = None) -> Interval | None:
        """The mean held-out payoff of a guideline on the path; or of the differences to another.

        Args:
            number: of a proposal on `path`.
            against: of another one there, on the same seeds.

        Returns:
            With its 95 % interval; None where no held-out episodes were played.
        """
        ours = self.proposals[number].payoffs
        theirs = [0.0] * len(ours) if against is None else self.proposals[against].payoffs
        both = [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
        return sign_flip_interval(both) if both else None


def evolve(
    env: str | EnvFactory,
    policy: Callable[[str], Policy],
    guideline: str,
    propose: Proposer,
    output: Path,
    *,
    episodes: int = 400,
    held_out: int = 400,
    children: int = 8,
    caps: Caps | None = None,
    payoff: Payoff = "reward",
    seed_start: int = 0,
    run: Mapping[str, Any] | None = None,
    label: str | None = None,
    **options: Any,
) -> Evolved:
    """Look for a better guideline; accepted is what is surely better than the one before it.

    A proposal plays ``episodes`` pairs against the guideline in whose place it would stand, on
    seeds that no other comparison has, and is accepted where the lower end of the 95 % interval of
    its mean difference is above 0: `stepagent.evaluation.sign_flips`. One that changes nothing is
    accepted in at most 2.5 % of all comparisons, one that plays the same never.

    Args:
        env: as `stepagent.rollout.run_episodes` takes it.
        policy: makes the policy that follows a guideline; ValueError for one that it cannot follow.
            `told` makes it of a language model's policy.
        guideline: to begin with; may be empty.
        propose: is shown failed episodes and answers another guideline. What it answers that is of
            no use is written down and passed over, and so is its failing.
        output: a folder, made where it is missing: ``journal.jsonl`` has all proposals and what
            came of them, ``guideline.txt`` the best. A search that was stopped goes on there.
        held_out: episodes of each accepted guideline that decide nothing; 0: none.
        children: proposals in a row that are not accepted, after which the search ends.
        caps: where it ends at the latest; None: `Caps()`.
        payoff: of an episode.
        seed_start: the first seed of the environment; it takes held_out + episodes · (1 + number of
            comparisons) of them.
        run: what else the episodes depend on, as JSON can hold it: a search goes on only with the
            same.
        label: of progress bars on stderr; None: no bars.
        options: further ones of `run_episodes`, such as ``max_steps`` or ``workers``.

    Raises:
        ValueError: for a folder with another search, and for a seed that the environment has no
            episode of; what was found until then stays.
        RuntimeError: where all episodes of the first guideline crash.
    """
    check_count("episodes", episodes)
    check_count("children", children)
    if held_out < 0:
        raise ValueError(f"held_out must be a whole number >= 0, got {held_out}")
    arena = Arena(env, policy, payoff, options)
    policy(guideline)  # one that cannot be followed is refused before anything is written
    identity = {
        "env": shown_name(env) if isinstance(env, str) else _named(env),
        "policy": _named(policy),
        "guideline": sha256(guideline.encode()).hexdigest()[:16],
        "proposer": _named(propose),
        "episodes": episodes,
        "held_out": held_out,
        "children": children,
        "payoff": payoff,
        "seed_start": seed_start,
        **(run or {}),
    }
    output.mkdir(parents=True, exist_ok=True)
    with open_search(output / "journal.jsonl", identity) as file:
        search = Search(
            file,
            arena,
            propose,
            episodes=episodes,
            held_out=held_out,
            children=children,
            seed_start=seed_start,
            label=label,
        )
        try:
            reason = search.run(guideline, caps or Caps())
        finally:
            if file.proposals:
                write_text(output / "guideline.txt", f"{search.path[-1].text}\n")
    return Evolved(file.proposals, search.spent, reason)


def told(policy: Policy) -> Callable[[str], Policy]:
    """Let a language model's policy read a guideline in its first message, after its own.

    Args:
        policy: with a ``system``, as ChatPolicy, EnginePolicy and ModelPolicy have.

    Raises:
        TypeError: for a policy that is told nothing.
    """
    if not hasattr(policy, "system"):
        raise TypeError(
            f"policy must read a first message (system) to follow a guideline, got {policy.name}"
        )
    speaker: Any = policy
    own: str | None = speaker.system

    def follow(guideline: str) -> Policy:
        parts = [part for part in (own, guideline.strip()) if part]
        speaker.system = "\n\n".join(parts) or None
        return policy

    return follow


def _named(given: Any) -> str:
    """Of a function or an object, for the record."""
    return str(getattr(given, "name", None) or getattr(given, "__qualname__", "own"))
