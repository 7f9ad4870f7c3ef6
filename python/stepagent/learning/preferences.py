"""Which of an expert's and an agent's way to go on is preferred, by IPR (arXiv 2406.11176)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..records.eto import PreferencePair
from ..records.ipr import ExpertStep, Exploration

Side: TypeAlias = Literal["agent", "expert"]


@dataclass(frozen=True)
class Judged:
    """What came of an action and of what followed it.

    Attributes:
        reward: R, the final one of the episode.
        step_reward: r, the mean final reward of the frozen policy's continuations of the action.
            Not used at the first step.
        length: of what is left of the episode, the action included, in messages or in steps.
    """

    reward: float
    step_reward: float
    length: int


@dataclass(frozen=True)
class Thresholds:
    """By how much a side has to be better.

    Attributes:
        trajectory: of the final reward R.
        step: of the step reward r, after the first step.
        shorter_wins: ALFWorld's exception: an agent that has less left to do needs no better R.
    """

    trajectory: float = 0.01
    step: float = 0.01
    shorter_wins: bool = False


def ipr_preference(
    step: int, agent: Judged, expert: Judged, thresholds: Thresholds | None = None
) -> Side | None:
    """The side that is preferred from a step on, None for a tie.

    At the first step, where whole trajectories are compared, the final reward decides alone. Later,
    final and step reward both have to be better by more than their threshold, on the same side. A
    reward that is NaN, as of an episode that crashed, is no better than any other.
    """
    limits = thresholds or Thresholds()
    if step == 0:
        if agent.reward > expert.reward + limits.trajectory:
            return "agent"
        return "expert" if expert.reward > agent.reward + limits.trajectory else None
    better = agent.reward > expert.reward + limits.trajectory
    shorter = limits.shorter_wins and agent.length < expert.length
    if (better or shorter) and agent.step_reward > expert.step_reward + limits.step:
        return "agent"
    worse = expert.reward > agent.reward + limits.trajectory
    if worse and expert.step_reward > agent.step_reward + limits.step:
        return "expert"
    return None


def ipr_pairs(
    explorations: Sequence[Exploration],
    step_rewards: Sequence[float],
    expert_steps: Mapping[tuple[str, int], ExpertStep],
    thresholds: Thresholds | None = None,
    *,
    instruction: Sequence[dict[str, str]] = (),
) -> list[PreferencePair]:
    """The pairs that IPR learns from, as its files have them.

    Args:
        explorations: As `stepagent.preferences.load_explorations` reads them.
        step_rewards: Of each, as `stepagent.preferences.monte_carlo_rewards` gives them.
        expert_steps: As `stepagent.preferences.load_expert_steps` reads them.
        thresholds: None: 0.01 both, those of IPR's run.
        instruction: Messages that each prompt begins with.

    Returns:
        The pairs of the first steps, then of the others; their id is that of the trajectory with
        the step after it. Where a message has no text there is no pair.

    Raises:
        ValueError: for a step of which the expert has none.
    """
    rewarded = list(zip(explorations, step_rewards, strict=True))
    ordered = [one for one in rewarded if one[0].iteration == 0]
    ordered += [one for one in rewarded if one[0].iteration != 0]
    pairs = (_pair(one, r, expert_steps, thresholds, list(instruction)) for one, r in ordered)
    return [pair for pair in pairs if pair is not None]


def _pair(
    one: Exploration,
    step_reward: float,
    expert_steps: Mapping[tuple[str, int], ExpertStep],
    thresholds: Thresholds | None,
    instruction: list[dict[str, str]],
) -> PreferencePair | None:
    t = one.iteration
    if (one.id, t) not in expert_steps:
        raise ValueError(f"there must be an expert's step {t} of id {one.id!r}, got none")
    expert = expert_steps[one.id, t]
    begin = 2 * t + 1
    own, its = one.agent_conversations[begin:], expert.gpt_conversations[begin:]
    if own and own[-1]["role"] == "user":
        own = own[:-1]
    if not own or not its or its[-1]["role"] != "assistant" or not _told(one, expert):
        return None
    side = ipr_preference(
        t,
        Judged(one.agent_final_reward, step_reward, len(own)),
        Judged(expert.gpt_reward, expert.monte_carlo_step_reward, len(its)),
        thresholds,
    )
    if side is None:
        return None
    chosen, rejected = (own, its) if side == "agent" else (its, own)
    prompt = [*instruction, *expert.gpt_conversations[:begin]]
    return PreferencePair(f"{one.id}{t}", prompt, chosen, rejected)


def _told(one: Exploration, expert: ExpertStep) -> bool:
    messages = [*one.agent_conversations, *expert.gpt_conversations]
    return all(message["content"].strip() for message in messages)
