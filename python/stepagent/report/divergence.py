"""Where the actions of an agent first differ from those of the expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.alignment import align_steps
from ..records.episodes import Episode
from .runs import Run


@dataclass(frozen=True)
class Divergence:
    """How an episode compares with the expert.

    step: the first at which the two act differently, or only one acts; None where none is.
    course: the actions of the expert's own episode on the same seed; empty where there is none and
    the step was found with the answers recorded at the agent's states. pairs: the course's steps
    that align with the agent's, as (expert step, agent step).
    """

    step: int | None
    course: Sequence[str] = ()
    pairs: Sequence[tuple[int, int]] = ()


def divergences(run: Run, runs: Sequence[Run]) -> list[Divergence | None]:
    """One for each episode of ``run``: None where the expert's actions are not known.

    The expert's own episode on the same seed is taken where it is among ``runs``, else the answers
    that the episode recorded.
    """
    if run.expert:
        return [None] * len(run.episodes)
    courses = {p: e for other in runs if other.expert for p, e in other.by_place().items()}
    return [_divergence(e, courses.get((e.environment, e.split, e.seed))) for e in run.episodes]


def _divergence(episode: Episode, expert: Episode | None) -> Divergence | None:
    if expert is not None:
        return _compared(expert.actions, episode.actions)
    if not any(answer is not None for answer in episode.expert_actions):
        return None
    answers = zip(episode.expert_actions, episode.actions, strict=True)
    differing = (t for t, (answer, action) in enumerate(answers) if answer not in (None, action))
    return Divergence(next(differing, None))


def _compared(expert: Sequence[str], agent: Sequence[str]) -> Divergence:
    """Side by side up to the first step that differs: so far both are in the same state. From
    there, aligned; a step of the expert's that has its place already is given another only where it
    is the same action."""
    step = align_steps(expert, agent).first_divergence
    alike = len(agent) if step is None else step
    rest = align_steps(expert[alike:], agent[alike:]).pairs
    assert rest is not None  # without a cutoff there always are
    last = min(alike + 1, len(expert), len(agent))
    pairs = [(t, t) for t in range(last)]
    aligned = [(alike + int(i), alike + int(j)) for i, j in rest]
    pairs += [(i, j) for i, j in aligned if j >= last and (i >= last or expert[i] == agent[j])]
    return Divergence(step, expert, pairs)
