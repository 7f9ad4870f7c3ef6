"""What a diagnosis found, and what it says in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .statistics import Interval

_FLUENT = 0.9  # share of valid answers below which an agent needs SFT before all else


@dataclass(frozen=True)
class ExpertStates:
    """How an agent acts at the expert's states of held-out trajectories.

    Attributes:
        trajectories: how many have a step that counts.
        steps: those at which the expert's text holds an action.
        unread: more steps, left out: the expert's text holds no action in the format.
        samples: answers a state at temperature 1.
        greedy: share of the steps at which the greedy answer's action is the expert's.
        sampled: the same share of the answers at temperature 1.
        readable: share of the greedy answers that hold an action; one that does not agrees with
            none.
        readable_sampled: the same of the answers at temperature 1.
    """

    trajectories: int
    steps: int
    unread: int
    samples: int
    greedy: Interval
    sampled: Interval
    readable: Interval
    readable_sampled: Interval


@dataclass(frozen=True)
class Departure:
    """Where a failed episode first did otherwise than the expert would have.

    Attributes:
        seed: of the episode.
        step: of the episode, from 0.
        action: what the agent did; None where its answer held no action.
        expert: what the expert would have done.
        preventable: the expert's own episode of this seed succeeds.
        mendable: the expert, going on right after this step, succeeds.
    """

    seed: int
    step: int
    action: str | None
    expert: str
    preventable: bool
    mendable: bool


@dataclass(frozen=True)
class GreedyEpisodes:
    """What became of an agent's greedy episodes, and of its expert's on the same seeds.

    Attributes:
        environment: its name.
        episodes: those that ended, N.
        crashed: seeds left out: an episode of the agent's or of the expert's crashed.
        success: of the agent.
        expert_success: of the expert.
        expert_steps: mean length of the expert's successful episodes; None for none.
        valid: share of the agent's actions that the environment took; None for no action.
        departed: share of the episodes, failed or not, with a departure.
        recovered: share of these that succeeded all the same; None for none with a departure.
        failures: episodes that failed.
        preventable: of these, with a departure, and the expert's own episode succeeds: it would not
            have failed had it never departed.
        mendable: of these, the expert succeeds from right after the first departure.
        beyond: of these, neither.
        mendable_share: mendable / failures; None for no failure.
        departures: the first one of each failed episode that has one.
    """

    environment: str
    episodes: int
    crashed: int
    success: Interval
    expert_success: Interval
    expert_steps: float | None
    valid: Interval | None
    departed: Interval
    recovered: Interval | None
    failures: int
    preventable: int
    mendable: int
    beyond: int
    mendable_share: Interval | None
    departures: tuple[Departure, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; ``episodes`` is None where there was no environment."""

    expert_states: ExpertStates
    episodes: GreedyEpisodes | None

    @property
    def expected_departures(self) -> float | None:
        """1 − aᴸ: the share of episodes that depart, were each of the L steps of an expert's
        episode by itself the expert's with probability a, the greedy agreement. An estimate, to be
        held beside `GreedyEpisodes.departed`; None without a successful episode of the expert."""
        if self.episodes is None or self.episodes.expert_steps is None:
            return None
        return float(1 - self.expert_states.greedy.mean**self.episodes.expert_steps)

    @property
    def verdict(self) -> str:
        """What training at the expert's states can gain, and what only the agent's own can."""
        return _verdict(self.expert_states, self.episodes)

    @property
    def recommendation(self) -> str:
        """Which method fits."""
        return _recommendation(self.expert_states, self.episodes)

    def as_text(self) -> str:
        """For a person."""
        lines = _at_expert_states(self.expert_states)
        if self.episodes is not None:
            lines += _in_environment(self.episodes, self.expected_departures)
        return "\n".join([*lines, self.verdict, self.recommendation])

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        said = {
            "expected_departures": self.expected_departures,
            "verdict": self.verdict,
            "recommendation": self.recommendation,
        }
        return asdict(self) | said


# ------------------------------------------------------------------ in words


def _verdict(states: ExpertStates, found: GreedyEpisodes | None) -> str:
    differs = f"{1 - states.greedy.mean:.1%}"
    if found is None:
        return (
            f"Training at the expert's states can gain at most the {differs} of their steps at "
            "which the agent does not act as the expert. What it could learn after such a step, "
            "which only states='agent' shows, cannot be said without an environment and its expert."
        )
    if not found.failures:
        return f"Nothing can be gained here: the agent failed in none of {found.episodes} episodes."
    prevented, mended = (
        f"{100 * count / found.episodes:.1f}" for count in (found.preventable, found.mendable)
    )
    return (
        f"Training at the expert's states can gain at most {prevented} points of success, and that "
        f"only if the agent never departed; now it does not act as the expert at {differs} "
        f"of the held-out steps. {found.mendable} of {found.failures} failures, {mended} points, "
        "can be mended after the departure, at states that only states='agent' shows."
    )


def _recommendation(states: ExpertStates, found: GreedyEpisodes | None) -> str:
    if found is not None and not found.failures:
        return "Look for episodes that the agent fails, or leave it as it is."
    valid = found.valid if found is not None and found.valid is not None else states.readable
    if (fluent := min(states.readable.mean, valid.mean)) < _FLUENT:
        return (
            f"First teach it to write actions: only {fluent:.1%} of its answers are valid ones. "
            "Train with --method sft, with this --action-format, and diagnose it again."
        )
    if found is None:
        return (
            "From trajectories alone: --method sft until the agreement at held-out states no "
            "longer rises, then --method srl where thoughts stand before actions. Where an expert "
            "can be asked in an environment: --method dagger; diagnose with --env says what that "
            "can gain."
        )
    if found.failures == found.beyond:
        return (
            "This expert would have prevented or mended none of the failures: look for episodes "
            "that the agent fails and the expert solves, or for another expert."
        )
    if 2 * found.mendable >= found.failures - found.beyond:
        return (
            "The expert can be asked, and most of what can be gained is mending: train at the "
            "agent's own states, --method dagger, or --method implicit with --states agent."
        )
    return (
        "Most of what can be gained is lost with the departure itself: train at the expert's "
        "states, with --method sft until the agreement at held-out states no longer rises, then "
        "with --method early_experience for what the agent's own actions lead to. --states agent "
        "shows the same states as far as the agent gets, and costs answers."
    )


def _at_expert_states(states: ExpertStates) -> list[str]:
    left_out = f"; {states.unread} more hold no action of the expert's" if states.unread else ""
    answers = f"{states.samples} answer{'s' if states.samples > 1 else ''} a step"
    return [
        f"at the expert's states: {states.steps} steps of {states.trajectories} held-out "
        f"trajectories{left_out}",
        _row("acts as the expert", states.greedy, "greedy"),
        _row("", states.sampled, f"at temperature 1, {answers}"),
        _row("holds an action", states.readable, "greedy"),
        _row("", states.readable_sampled, "at temperature 1"),
    ]


def _in_environment(found: GreedyEpisodes, expected: float | None) -> list[str]:
    crashed = f"; {found.crashed} more crashed" if found.crashed else ""
    length = "" if found.expert_steps is None else f"{found.expert_steps:.1f} steps"
    guess = "" if expected is None else f"by that agreement about {expected:.1%}"
    rows = [
        f"in {found.environment}: {found.episodes} greedy episodes{crashed}",
        _row("success", found.success),
        _row("of the expert", found.expert_success, length),
    ]
    if found.valid is not None:
        rows.append(_row("valid actions", found.valid))
    rows.append(_row("departs", found.departed, guess))
    if found.recovered is not None:
        rows.append(_row("and succeeds", found.recovered, "of those that depart"))
    if found.mendable_share is not None:
        rows += [
            _row("mendable failures", found.mendable_share, "after the first departure"),
            f"of {found.failures} failures: {found.preventable} would not be, had the agent never "
            f"departed; {found.mendable} can be mended after it; {found.beyond} neither",
        ]
    return rows


def _row(name: str, share: Interval, note: str = "") -> str:
    known = share.low is not None and share.high is not None
    ends = f"95 %: {share.low:.1%} to {share.high:.1%}" if known else "no interval"
    return f"  {name:<20}{share.mean:>6.1%}  ({ends})  {note}".rstrip()
