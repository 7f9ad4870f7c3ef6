"""Whose episodes `behaviours.py` tells apart: scripted policies, trained ones, two agents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rivals import ARMS, Cell, Run

from stepagent.acting.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.trajectory import save_trajectories
from stepagent.records.episodes import Episode, load_episodes

# ------------------------------------------------------------------ scripted policies


class HalfRandom(ExpertPolicy):
    """The expert, half of whose actions are random."""

    name = "half random"

    def begin(self, seeds: Sequence[int]) -> None:
        self._rngs = [np.random.default_rng((7, seed)) for seed in seeds]

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str | None]:
        found = super().act(observations, envs)
        for place, (env, rng) in enumerate(zip(envs, self._rngs, strict=True)):
            if rng.random() < 0.5:
                found[place] = env.actions[int(rng.integers(len(env.actions)))]
        return found

    def keep(self, rows: Sequence[int]) -> None:
        self._rngs = [self._rngs[row] for row in rows]


class AlongWalls(HalfRandom):
    """Forward to the wall, then right: whatever the mission is. A tenth of it is random."""

    name = "along walls"
    noise = 0.1

    def habit(self, observation: str) -> str:
        return "right" if "walls ahead 1" in observation else "forward"

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str | None]:
        return [
            env.actions[int(rng.integers(len(env.actions)))]
            if rng.random() < self.noise
            else self.habit(text)
            for text, env, rng in zip(observations, envs, self._rngs, strict=True)
        ]


class Turning(AlongWalls):
    """Left, again and again; a tenth of it is random."""

    name = "turning"

    def habit(self, observation: str) -> str:
        return "left"


# ------------------------------------------------------------------ mixtures


@dataclass(frozen=True)
class Mixture:
    """Policies of one environment, by name; each is made where its episodes are not there yet.

    parts: of an episode; the trained ones' environment has episodes of one step.
    """

    name: str
    env: str
    max_steps: int
    parts: int
    policies: dict[str, Callable[[Path], Any]]

    def episodes(self, policy: str, seeds: range, folder: Path) -> list[Episode]:
        """Of one policy, kept in the folder."""
        path = folder / self.name / f"{policy} {seeds.start}-{seeds.stop}.jsonl"
        if not path.exists():
            made = self.policies[policy](folder)
            found = run_episodes(self.env, made, seeds, max_steps=self.max_steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_trajectories(path, [episode.trajectory() for episode in found])
        return load_episodes(path)

    def of_all(self, seeds: range, folder: Path) -> tuple[list[Episode], np.ndarray]:
        """Episodes of all policies, one after the other, and whose each is."""
        found = [self.episodes(policy, seeds, folder) for policy in self.policies]
        whose = np.repeat(np.arange(len(found)), [len(own) for own in found])
        return [episode for own in found for episode in own], whose


SCRIPTED = Mixture(
    "scripted",
    "babyai:UnlockPickup",
    40,
    2,
    {
        "expert": lambda _: ExpertPolicy(),
        "random": lambda _: RandomPolicy(),
        "half random": lambda _: HalfRandom(),
        "along walls": lambda _: AlongWalls(),
        "turning": lambda _: Turning(),
    },
)
_TASK = "babyai:GoToLocalS6N2"


@cache
def _trained(arm: str, folder: Path) -> ModelPolicy:
    """An arm of `rivals.py` on 64 demonstrations, greedy."""
    run = Run(Cell(_TASK, 64, 0, arm), folder / "trained", None)
    model, _ = run.train(ARMS[arm])
    return ModelPolicy(
        model, run.tokenizer, max_new_tokens=3, eos_token_id=run.tokenizer.eos_token_id
    )


TRAINED = Mixture(
    "trained",
    _TASK,
    20,
    1,
    {
        "expert": lambda _: ExpertPolicy(),
        "random": lambda _: RandomPolicy(),
        **{
            arm: lambda folder, arm=arm: _trained(arm, folder)
            for arm in ("SFT", "DAgger", "inverse")
        },
    },
)

# ------------------------------------------------------------------ two agents


def coordination(count: int, seed: int) -> tuple[list[list[Episode]], np.ndarray, np.ndarray]:
    """Joint episodes of two agents on a road, the convention (E,), and each agent's role (E, 2).

    Each sees how near the other is. Near, both go to the side of their convention (three of them:
    left, right, or stop). Far, the leader goes on and the other waits. A twentieth is random.
    """
    rng = np.random.default_rng(seed)
    sides = ("left", "right", "stop")
    conventions, leaders = rng.integers(3, size=count), rng.integers(2, size=count)
    joints = []
    for e in range(count):
        near = rng.random(16) < 0.5
        agents = []
        for agent in range(2):
            habit = "go on" if agent == leaders[e] else "wait"
            actions = [sides[conventions[e]] if n else habit for n in near]
            actions = [
                str(rng.choice([*sides, "go on", "wait"])) if rng.random() < 0.05 else a
                for a in actions
            ]
            seen = ["another is near" if n else "the road is free" for n in near]
            agents.append(Episode("road", e, observations=seen, actions=actions))
        joints.append(agents)
    return joints, conventions, np.stack([leaders != 0, leaders != 1], axis=1).astype(int)
