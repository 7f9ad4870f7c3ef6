"""What the agent's own alternatives lead to at the expert's states, by trying them.

Early Experience (arXiv 2510.08558) asks no expert and needs no reward. The states are those of a
trajectory, the alternatives what `stepagent.inspect` found that the agent would do there::

    o₁ a₁ o₂ a₂ o₃ …        the trajectory
          └─ â₂ ô₃          replayed to o₂, then an alternative: what does the environment show?

`world_model_trunks` makes of these what a model learns to predict them from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..data.actions import PLAIN, ActionFormat, FormatName
from ..data.actions import action_format as as_format
from ..data.branch import Branch
from ..data.ends import ends_of, without_end
from ..data.observations import encode_observations
from ..data.trajectory import Trajectory
from ..data.trunk import Trunk
from ..envs.pool import EnvFactory
from ..records.episodes import Episode, split_system
from .lockstep import roll_out
from .rollout import env_seed
from .runs import Options, Start

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..envs.base import TextEnv


@dataclass(frozen=True)
class Outcome:
    """An answer at a state, and what it led to.

    Attributes:
        answer: as the agent wrote it.
        observation: what the environment showed next, also where the episode ended by it; what
            refused an answer without an action.
        valid: it was an action of the environment.
        ended: the episode was over.
    """

    answer: str
    observation: str
    valid: bool
    ended: bool


def executed(
    env: str | EnvFactory,
    trajectories: Sequence[Trajectory],
    answers: Sequence[Sequence[Sequence[str]]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    timeout: float | None = None,
    progress: bool = False,
    action_format: FormatName | ActionFormat | Callable[[str], str] = "plain",
) -> list[list[list[Outcome]]]:
    """What each answer leads to: ``outcomes[i][t]``, of the distinct ones of ``answers[i][t]``.

    The environment is brought to a state by replay: ``reset(meta["seed"])`` and the trajectory's
    actions, t steps before step t, which must show the trajectory's observations. Answers with one
    action are tried once at a state, and where it is the trajectory's own, what it led to is read
    in the record if that says it. Options: `stepagent.rollout.run_episodes`.

    Args:
        trajectories: as `Episode.trajectory` gives them: turns of user and assistant, and the
            environment's seed in ``meta``.
        answers: ``[i][t][k]``, as `texts_of` reads them in branches.

    Returns:
        Outcomes in the order of their answers. Those that crashed the environment are left out,
        with a `RuntimeWarning`.

    Raises:
        ValueError: for another trajectory, and where a replay takes another course, as in another
            version of the environment, naming the trajectory and the step.
        RuntimeError: where ``CRASHES_IN_A_ROW`` environments crash and no other answers between.
    """
    form = as_format(action_format)
    _check_lengths(trajectories, answers)
    starts = [_start(i, trajectory) for i, trajectory in enumerate(trajectories)]
    distinct: dict[_Place, str] = {}
    for i, steps in enumerate(answers):
        for t, tried in enumerate(steps):
            for answer in tried:
                distinct.setdefault((i, t, _meaning(answer, form)), answer)
    outcomes = {(i, t, action): _recorded(starts[i], t, action, form) for i, t, action in distinct}
    missing = [place for place, outcome in outcomes.items() if outcome is None]
    branching = [replace(starts[i], key=key, steps=t) for key, (i, t, _) in enumerate(missing)]
    policy = _Alternatives([distinct[place] for place in missing])
    options = Options(None, None, batch_size, workers, timeout, action_format=form)
    episodes = roll_out(env, policy, branching, options, "alternatives" if progress else None)
    for place, start, episode in zip(missing, branching, episodes, strict=True):
        outcomes[place] = _outcome(start, episode)
    return [
        [
            [
                replace(outcome, answer=answer)
                for answer in dict.fromkeys(tried)
                if (outcome := outcomes[i, t, _meaning(answer, form)]) is not None
            ]
            for t, tried in enumerate(steps)
        ]
        for i, steps in enumerate(answers)
    ]


def texts_of(
    trunks: Sequence[Trunk],
    branches: Sequence[Sequence[Sequence[Branch | NDArray[Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int] | None = None,
) -> list[list[list[str]]]:
    """The texts of branches, as `executed` takes them: without the end of the turn, stripped.

    Args:
        ends: the tokens that end an action; None: those that end the actions of ``trunks``.
    """
    known = ends_of(trunks) if ends is None else ends

    def text(branch: Branch | NDArray[Any]) -> str:
        ids = branch.token_ids if isinstance(branch, Branch) else branch
        kept = list(without_end(ids.tolist(), known))
        return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False)).strip()

    return [[[text(branch) for branch in step] for step in steps] for steps in branches]


def world_model_trunks(
    trajectories: Sequence[Trajectory],
    trunks: Sequence[Trunk],
    outcomes: Sequence[Sequence[Sequence[Outcome]]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[Trunk, NDArray[np.bool_]]]:
    """The trunks with the observations that the answers led to, and which spans these are.

    Implicit world modelling: state, answer, and what came of it, of which the last is scored beside
    the trajectory's own actions. See `stepagent.data.observations.encode_observations`.

    Args:
        trunks: of the trajectories, as `stepagent.encode` gives them.
        outcomes: ``[i][t]``, as `executed` gives them.
    """
    _check_lengths(trajectories, outcomes)
    return [
        encode_observations(
            one, trunk, [[(o.answer, o.observation) for o in step] for step in steps], tokenizer
        )
        for one, trunk, steps in zip(trajectories, trunks, outcomes, strict=True)
    ]


_Place = tuple[int, int, str | None]  # trajectory, step, action


class _Alternatives:
    """A policy that answers once in each episode, and then gives it up."""

    name = "alternatives"

    def __init__(self, answers: Sequence[str]) -> None:
        self._answers: list[str | None] = list(answers)
        self._rows: list[int] = []

    def begin(self, seeds: Sequence[int]) -> None:
        """Each episode's answer is that of its number."""
        self._rows = list(seeds)

    def resume(
        self, seeds: Sequence[int], trajectories: Sequence[Trajectory], steps: Sequence[int]
    ) -> None:
        """As `begin`."""
        self.begin(seeds)

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str | None]:
        """The answers that were not given yet."""
        given = [self._answers[row] for row in self._rows]
        for row in self._rows:
            self._answers[row] = None
        return given

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the episodes that are over."""
        self._rows = [self._rows[row] for row in rows]


def _meaning(answer: str, form: ActionFormat) -> str | None:
    """The same for answers that do the same: the action, or None where there is none.

    Of a plain one in a wrapping, the answer itself: whether that is part of it, the environment
    knows (`stepagent.acting.lockstep`).
    """
    action = form.parse(answer).action
    return answer if form == PLAIN and action != answer.strip() else action


def _start(index: int, trajectory: Trajectory) -> Start:
    """Before the first action. The system message is left out: no policy here is told anything."""
    turns = replace(trajectory, messages=split_system(trajectory)[1])
    return Start(env_seed(index, trajectory), 0, turns, 0, f"trajectories[{index}]")


def _recorded(start: Start, t: int, action: str | None, form: ActionFormat) -> Outcome | None:
    """What the trajectory's own action led to; None for others, and where the record does not say
    it all."""
    answer = start.content(2 * t + 1)
    if action != _meaning(answer, form):
        return None
    assert start.trajectory is not None
    meta, T = start.trajectory.meta, start.trajectory.num_steps
    valid, reason = meta.get("valid") or [], meta.get("terminate_reason")
    if len(valid) != T:  # of no episode, or of one that was cut since
        return None
    if t + 1 < T:
        return Outcome(answer, start.content(2 * t + 2), bool(valid[t]), ended=False)
    last = meta.get("last_observation")
    if reason is None or last is None:
        return None
    return Outcome(answer, last, bool(valid[t]), ended=reason in ("terminated", "truncated"))


def _outcome(start: Start, episode: Episode) -> Outcome | None:
    """Of an episode that was replayed to a state and took one answer there; None if it crashed."""
    if episode.crashed is not None:
        return None
    t = start.steps
    over = len(episode.actions) == t
    start.check_shown(t, None if over else episode.observations[t])
    ended = episode.terminate_reason != "gave_up"
    return Outcome(episode.actions[t], str(episode.last_observation), episode.valid[t], ended)


def _check_lengths(trajectories: Sequence[Trajectory], steps: Sequence[Sequence[Any]]) -> None:
    if len(steps) != len(trajectories):
        raise ValueError(
            f"there must be answers for each of the {len(trajectories)} trajectories, got "
            f"{len(steps)}"
        )
    for i, (trajectory, tried) in enumerate(zip(trajectories, steps, strict=True)):
        if len(tried) != trajectory.num_steps:
            raise ValueError(
                f"trajectories[{i}] ({trajectory.id!r}) must have answers for each of its "
                f"{trajectory.num_steps} steps, got {len(tried)}"
            )
