"""What methods share that have the agent act in the demonstrations' tasks, from their beginning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ...records.episodes import Episode, split_system
from .method import Method, Run

if TYPE_CHECKING:
    from ...data.trajectory import Trajectory
    from ...data.trunk import Trunk
    from ..collecting import Acting
    from ..config import StepAgentConfig


ROUNDING = 1e-6  # what an environment's rewards may lose where they are added up


class TaskMethod(Method):
    """Rolls the agent out ``samples`` times in the task of each demonstration."""

    explores = True
    whole_episodes = True
    needs_env = True
    needs_answers = False
    _run: Run

    @classmethod
    def check(cls, args: StepAgentConfig) -> None:
        if args.states != "expert":
            raise ValueError(
                f"method={args.method!r} acts in the tasks of the demonstrations, got "
                f"states={args.states!r}"
            )
        if args.samples > 1 and not args.temperature:
            raise ValueError(
                "temperature must be > 0 for several samples of a task, which would be all equal, "
                f"got {args.temperature:g} with samples={args.samples}"
            )

    def start(self, run: Run) -> None:
        """What would fail in the first cycle fails here: each task's seed, and the system message
        of them all."""
        self._run = run
        self._seeds = [task_seed(i, one) for i, one in enumerate(run.trajectories)]
        systems = [split_system(one)[0] for one in run.trajectories]
        for i, system in enumerate(systems):
            if system != systems[0]:
                raise ValueError(
                    "train_dataset must have one system message, which the agent is given too, "
                    f"got {system!r} in row {i} and {systems[0]!r} in row 0"
                )
        self._system = systems[0]

    def rollouts(self, acting: Acting) -> tuple[list[list[tuple[Trunk, float]]], dict[str, float]]:
        """``[i][n]``, the tokens and the reward of each rollout that has both; and figures.

        Raises:
            ValueError: where a rollout begins with another prompt than its demonstration.
        """
        episodes = acting.episodes(self._seeds, samples=self.args.samples, system=self._system)
        found = [[one for e in tried if (one := outcome(e)) is not None] for tried in episodes]
        for i, of_task in enumerate(found):
            for trunk, _ in of_task:
                self._check_begins(i, trunk)
        rewards = [reward for of_task in found for _, reward in of_task]
        return found, {
            "rollouts": len(rewards),
            "rollouts_without_reward": sum(map(len, episodes)) - len(rewards),
            "rollout_reward": float(np.mean(rewards)) if rewards else math.nan,
        }

    def _check_begins(self, i: int, trunk: Trunk) -> None:
        own, demonstrated = trunk.state_ids(0), self._run.trunks[i].state_ids(0)
        if not np.array_equal(own, demonstrated):
            seen, told = (self._run.tokenizer.decode(ids.tolist()) for ids in (own, demonstrated))
            raise ValueError(
                f"train_dataset[{i}] ({self._run.trajectories[i].id!r}) must begin as env does "
                f"with its seed {self._seeds[i]}, {seen!r}, got {told!r}"
            )


def task_seed(i: int, demonstration: Trajectory) -> int:
    """The seed of the environment that a demonstration is of.

    Raises:
        ValueError: where its ``meta`` has none.
    """
    seed = demonstration.meta.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(
            f"train_dataset[{i}] ({demonstration.id!r}) must have the seed of its environment in "
            f"meta['seed'], as `stepagent collect` writes it, got {seed!r}"
        )
    return seed


def outcome(episode: Episode) -> tuple[Trunk, float] | None:
    """Tokens and reward of an episode; None of one that crashed, that took no step, or whose
    reward is no number. That it succeeded is not asked: rewards are what is compared."""
    reward = math.fsum(episode.rewards)
    if episode.crashed is not None or episode.trunk is None or not math.isfinite(reward):
        return None
    return episode.trunk, reward


def gold(demonstration: Trajectory) -> float:
    """What a demonstration earned: its reward, or 1 where it does not say."""
    return 1.0 if demonstration.reward is None else float(demonstration.reward)
