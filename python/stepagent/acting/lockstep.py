"""Episodes in lock-step: one batch of decisions and one round of environment calls a step.

An environment that crashes ends its own episode, which says so and has no outcome; so does a policy
that fails at one episode alone. An answer in which the run's action format finds no action does not
reach the environment: the agent gets a message, and the step counts as an invalid one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from .. import envs as environments
from ..data.actions import PLAIN
from ..envs.base import TextEnv
from ..envs.pool import Call, EnvCrash, EnvFactory, EnvPool, ask_about, open_pool
from ..records.episodes import Episode, TerminateReason
from .answers import Answer, Decision, Stop
from .dialogues import Dialogues
from .policies import Policy
from .runs import Asks, Expert, Options, Start, Teacher, answers_of

T = TypeVar("T")

CRASHES_IN_A_ROW = 10  # episodes; more than bad luck


def roll_out(
    env: str | EnvFactory,
    policy: Policy,
    starts: Sequence[Start],
    options: Options,
    progress: str | None,
) -> list[Episode]:
    """The episodes of these starts, in their order, batch by batch."""
    make = environments.factory(env) if isinstance(env, str) else env
    for start in starts:
        start.check_system(policy)
    size = options.batch_size
    workers = min(options.workers, size, len(starts))
    episodes: list[Episode] = []
    ended: list[Episode] = []
    with open_pool(make, workers, options.timeout) as pool:
        if starts:  # before anything begins, the bar included
            ask_about(pool.env(0), "check_seeds", [start.seed for start in starts])
        with tqdm(total=len(starts), desc=progress, disable=progress is None) as bar:
            for first in range(0, len(starts), size):
                part = starts[first : first + size]
                episodes += Lockstep(pool, policy, part, options, ended, bar).run()
    _warn_of_crashes(episodes)
    return episodes


def _warn_of_crashes(episodes: Sequence[Episode]) -> None:
    crashed = [episode for episode in episodes if episode.crashed is not None]
    if crashed:
        warnings.warn(
            f"{len(crashed)} of {len(episodes)} episodes crashed and have no outcome; the first, "
            f"{crashed[0].environment} with seed {crashed[0].seed}: {crashed[0].crashed}",
            RuntimeWarning,
            stacklevel=4,
        )


class Lockstep:
    """A batch of episodes that run together; each has a row, which is its environment's place."""

    def __init__(
        self,
        pool: EnvPool,
        policy: Policy,
        starts: Sequence[Start],
        options: Options,
        ended: list[Episode],
        bar: Any,
    ) -> None:
        self._pool, self._policy, self._options = pool, policy, options
        self._starts, self._ended, self._bar = starts, ended, bar
        name = pool.env(0).name
        system, form = getattr(policy, "system", None), options.action_format.name
        self._episodes = [
            Episode(name, s.seed, policy.name, options.split, system=system, action_format=form)
            for s in starts
        ]
        self._observations = [""] * len(starts)
        self._over = [False] * len(starts)
        self._told = [False] * len(starts)  # of an answer without an action, and so one step behind
        self._active = list(range(len(starts)))  # the policy's rows, in its order

    def run(self) -> list[Episode]:
        """The episodes, ended or crashed."""
        self._begin()
        self._settle()
        while self._active:
            if self._options.expert is not None:
                self._query(self._options.expert)
            answers = self._act()  # first: a crash of an expert that is asked changes what follows
            if self._options.teacher is not None:
                answers = self._taught(self._options.teacher, answers)
            decided = list(zip(self._active, answers, strict=True))
            for row, answer in decided:
                if answer is None or isinstance(answer, Stop):
                    self._stop(row, answer)
            self._take((r, a) for r, a in decided if a is not None and not isinstance(a, Stop))
            self._settle()
        return self._episodes

    def _begin(self) -> None:
        """Bring every environment, then the policy, to the start."""
        for row, (observation, info) in self._call(
            (row, "reset", (start.seed,)) for row, start in enumerate(self._starts)
        ):
            self._observations[row] = observation
            self._episodes[row].task = info.get("task")
            self._episodes[row].difficulty = info.get("difficulty")
        for step in range(max(start.steps for start in self._starts)):
            self._replay(step)
        for row in self._active:
            if self._episodes[row].crashed is not None:
                self._close(row)
        self._active = [row for row in self._active if self._episodes[row].crashed is None]
        starts = [self._starts[row] for row in self._active]
        keys = [start.key for start in starts]
        trajectories = [start.trajectory for start in starts if start.trajectory is not None]
        if trajectories:
            self._policy.resume(keys, trajectories, [start.steps for start in starts])
        elif starts:
            self._policy.begin(keys)

    def _replay(self, step: int) -> None:
        going = [
            row
            for row, start in enumerate(self._starts)
            if start.steps > step and self._episodes[row].crashed is None
        ]
        for row in going:
            self._check_replay(row, step)
        self._take((row, Answer(self._starts[row].content(2 * step + 1))) for row in going)

    def _check_replay(self, row: int, step: int) -> None:
        """The environment shows what the trajectory says before its action at this step."""
        shown = None if self._over[row] else self._observations[row]
        self._starts[row].check_shown(step, shown)

    def _stop(self, row: int, stop: Stop | None) -> None:
        """Where the policy has no answer, the episode is over as it stands."""
        episode = self._episodes[row]
        self._over[row] = True
        del episode.expert_actions[len(episode.actions) :]
        if stop is None:
            episode.gave_up, episode.terminate_reason = True, "gave_up"
        elif stop.kind == "context_limit":
            episode.terminate_reason = "context_limit"
        else:
            self._mark(EnvCrash(row, f"the policy failed: {stop.reason}"))

    def _act(self) -> Sequence[Decision]:
        return self._asked(
            lambda envs: self._policy.act([self._observations[row] for row in self._active], envs)
        )

    def _taught(self, teacher: Teacher, answers: Sequence[Decision]) -> list[Decision]:
        """The answers, with the expert's where the teacher acts and the expert has one."""
        decided = list(answers)
        for place in self._places(teacher.acts):
            action = self._episodes[self._active[place]].expert_actions[-1]
            if action is None or not isinstance(decided[place], str):
                continue  # without an answer the policy acts; where it has none, the episode ends
            assert isinstance(self._policy, Dialogues)
            text = self._options.action_format.written(action)
            own = self._policy.overrule(place, text, teacher.tokens(text))
            decided[place] = Answer(text, action=action, overruled=own)
        return decided

    def _query(self, expert: Expert) -> None:
        asks = self._options.asks

        def some(envs: list[TextEnv]) -> Sequence[str | None]:
            places = range(len(envs)) if asks is None else self._places(asks)
            found = answers_of(expert, [envs[place] for place in places])
            by_place = dict(zip(places, found, strict=True))
            return [by_place.get(place) for place in range(len(envs))]

        answers = self._asked(some)
        for row, answer in zip(self._active, answers, strict=True):
            self._episodes[row].expert_actions.append(answer)

    def _places(self, asks: Asks) -> list[int]:
        """Those of the running episodes that are meant, by their places."""
        keys = [self._starts[row].key for row in self._active]
        steps = [len(self._episodes[row].actions) for row in self._active]
        return [int(place) for place in np.flatnonzero(asks(keys, steps))]

    def _asked(self, ask: Callable[[list[TextEnv]], Sequence[T]]) -> Sequence[T]:
        """What ``ask`` makes of the running environments; those that crash meanwhile are out."""
        while self._active:
            try:
                return ask([self._pool.env(row) for row in self._active])
            except EnvCrash as crash:  # its expert was asked
                self._mark(crash)
                self._settle()
        return []

    def _take(self, answers: Iterable[tuple[int, str]]) -> None:
        """Read these answers; take the actions in them, and refuse what has none."""
        actions: dict[int, str] = {}
        given: dict[int, Answer] = {}
        for row, answer in answers:
            given[row] = self._answer(answer)
            try:
                action, problem = self._read(row, given[row])
            except EnvCrash as crash:
                self._mark(crash)
                continue
            if action is None:
                self._refuse(row, given[row], problem)
            else:
                actions[row] = action
        for row, step in self._call((row, "step", (action,)) for row, action in actions.items()):
            self._record(row, given[row], actions[row], step)

    def _answer(self, answer: str) -> Answer:
        if isinstance(answer, Answer):
            return answer
        if getattr(self._policy, "exact", False):  # an action, not a model's text
            return Answer(self._options.action_format.write(answer), action=answer)
        return Answer(answer)

    def _read(self, row: int, answer: Answer) -> tuple[str | None, str | None]:
        """The action of an answer, or None and the problem. EnvCrash where the environment that is
        asked for its own words crashes."""
        if answer.problem is not None or answer.action is not None:
            return answer.action, answer.problem
        form = self._options.action_format
        parsed = form.parse(answer.text)
        action = parsed.action
        if action is None:
            return None, parsed.problem
        # In other letters, or in a wrapping that may be part of it: the environment knows.
        doubtful = form == PLAIN and action != answer.text.strip()
        if doubtful or action != action.lower():
            action = ask_about(self._pool.env(row), "known_action", answer.text, action)
        return action, None

    def _record(
        self, row: int, answer: Answer, action: str, step: tuple[str, float, bool, bool, Any]
    ) -> None:
        observation, reward, terminated, truncated, info = step
        self._append(row, answer, action, observation)
        episode = self._episodes[row]
        episode.rewards.append(reward)
        episode.valid.append(info["valid"])
        episode.invalid.append(None if info["valid"] else info.get("invalid"))
        episode.progress.append(info["progress"])
        episode.success = info["success"]
        if terminated or truncated:
            self._end(row, "terminated" if terminated else "truncated")

    def _refuse(self, row: int, answer: Answer, problem: str | None) -> None:
        """A step that the environment does not see, which counts against its limit all the same."""
        self._append(row, answer, None, self._options.action_format.refusal)
        episode = self._episodes[row]
        episode.rewards.append(0.0)
        episode.valid.append(False)
        episode.invalid.append(problem)
        episode.progress.append(episode.progress[-1] if episode.progress else 0.0)
        self._told[row] = True

    def _append(self, row: int, answer: Answer, action: str | None, observation: str) -> None:
        episode = self._episodes[row]
        done = episode.done
        episode.observations.append(self._observations[row])
        episode.actions.append(answer.text)
        # These lists are empty until they tell something.
        episode.taken = [*done, action] if episode.taken or action != answer.text else []
        if answer.truncated or episode.truncated:
            missing = [False] * (len(episode.actions) - 1 - len(episode.truncated))
            episode.truncated += [*missing, answer.truncated]
        if answer.overruled is not None or episode.overruled:
            before = [None] * (len(episode.actions) - 1 - len(episode.overruled))
            episode.overruled += [*before, answer.overruled]
        episode.last_observation = self._observations[row] = observation

    def _end(self, row: int, reason: TerminateReason) -> None:
        self._over[row] = True
        self._episodes[row].terminate_reason = reason

    def _end_at_limit(self, row: int) -> None:
        """Of an episode that may have taken the steps that it has."""
        steps, limit = len(self._episodes[row].actions), self._options.max_steps
        if limit is not None and steps >= limit:
            self._end(row, "max_steps")
        elif self._told[row]:
            try:
                if steps >= self._pool.env(row).max_steps:
                    self._end(row, "truncated")
            except EnvCrash as crash:
                self._mark(crash)

    def _call(self, calls: Iterable[Call]) -> list[tuple[int, Any]]:
        """What the environments answered, by row; those that crashed are marked."""
        asked = list(calls)
        answers = []
        for (row, *_), answer in zip(asked, self._pool.call(asked), strict=True):
            if isinstance(answer, EnvCrash):
                self._mark(answer)
            else:
                answers.append((row, answer))
        return answers

    def _mark(self, crash: EnvCrash) -> None:
        episode = self._episodes[crash.place]
        episode.crashed, episode.success = crash.reason, False
        episode.terminate_reason = "crashed"
        del episode.expert_actions[len(episode.actions) :]  # its step has no outcome

    def _settle(self) -> None:
        """Let the episodes that are over leave the batch, and the policy."""
        going = []
        for place, row in enumerate(self._active):
            episode = self._episodes[row]
            if episode.crashed is None and not self._over[row]:
                self._end_at_limit(row)
            if episode.crashed is None and not self._over[row]:
                going.append(place)
                continue
            told = episode.crashed is None and bool(episode.actions)
            if told:
                given = getattr(self._policy, "chat_template_kwargs", {})
                episode.chat_template_kwargs = dict(given)
            if told and isinstance(self._policy, Dialogues):
                episode.trunk, episode.logps = self._policy.record(place)
                episode.made_with = self._policy.made_with
            self._close(row)
        if len(going) < len(self._active):
            self._active = [self._active[place] for place in going]
            self._policy.keep(going)

    def _close(self, row: int) -> None:
        self._ended.append(self._episodes[row])
        if self._options.on_end is not None:
            self._options.on_end(self._episodes[row])
        self._bar.update()
        latest = [episode.crashed for episode in self._ended[-CRASHES_IN_A_ROW:]]
        if len(latest) == CRASHES_IN_A_ROW and None not in latest:
            raise RuntimeError(
                f"{CRASHES_IN_A_ROW} episodes in a row crashed, the last with seed "
                f"{self._episodes[row].seed}: {latest[-1]}"
            )
