"""Behaviours: are five policies told apart, is a switch found, and what do two levels add?

    python benchmarks/claim/behaviours.py --seeds 3 --output runs/behaviours    # resumes

**Mixture.** Episodes of five policies in BabyAI, of two thirds of which a model is fitted without
their labels: the expert, chance, an expert half of whose actions are random, one that walks along
the walls, and one that mostly turns. The figure is the adjusted Rand index (ARI) of clusters and
policies on the other third; and between two seeds of the model. **Switch.** Eight cycles of 20
held-out episodes, of the half-random expert and then of the expert: the change point found, less
the true one; and of eight cycles without a switch, how often one is found. **Toy.** Two agents
choose a side of a road (the convention, shared) while one leads and one waits (the role). ARI of
joint clusters with the convention and of local ones with the role, hierarchical and flat: the
flat rival has no joint latent, so an episode is told by the mean of its agents' latents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent.acting.policies import ExpertPolicy, RandomPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.analysis import Behaviours, LatentOptions, change_points
from stepagent.data.trajectory import save_trajectories
from stepagent.records.episodes import Episode, load_episodes

ENV = "babyai:UnlockPickup"
MAX_STEPS = 40

# ------------------------------------------------------------------ policies


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


POLICIES: dict[str, Callable[[], Any]] = {
    "expert": ExpertPolicy,
    "random": RandomPolicy,
    "half random": HalfRandom,
    "along walls": AlongWalls,
    "turning": Turning,
}


def episodes_of(policy: str, seeds: range, folder: Path) -> list[Episode]:
    """Kept in the folder."""
    path = folder / f"{policy} {seeds.start}-{seeds.stop}.jsonl"
    if not path.exists():
        found = run_episodes(ENV, POLICIES[policy](), seeds, max_steps=MAX_STEPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trajectories(path, [episode.trajectory() for episode in found])
    return load_episodes(path)


# ------------------------------------------------------------------ mixture, switch


def fitted(folder: Path, seed: int, each: int) -> Behaviours:
    known = [e for p in POLICIES for e in episodes_of(p, range(each), folder)]
    return Behaviours.fit(known, count=len(POLICIES), seed=seed)


def mixture(folder: Path, seed: int, each: int) -> dict[str, Any]:
    found = fitted(folder, seed, each)
    half = each // 2
    held_out = {p: episodes_of(p, range(10_000, 10_000 + half), folder) for p in POLICIES}
    labels = found.assign([e for own in held_out.values() for e in own])
    true = np.repeat(np.arange(len(POLICIES)), half)
    table = np.zeros((len(POLICIES), len(POLICIES)), int)
    np.add.at(table, (true, labels), 1)
    return {
        "seed": seed,
        "ari": adjusted_rand_score(true, labels),
        "labels": labels.tolist(),
        "table": table.tolist(),
        "names": list(found.names),
        "gain": found.gain,
        "switches": switches(found, folder, seed),
    }


def switches(found: Behaviours, folder: Path, seed: int) -> dict[str, Any]:
    """Errors of change points, in cycles; and how many of as many sequences without one had one."""
    before = found.assign(episodes_of("half random", range(20_000, 20_160), folder))
    after = found.assign(episodes_of("expert", range(20_000, 20_160), folder))
    rng = np.random.default_rng(seed)
    errors, false = [], 0
    for at in range(1, 8):
        cycles = [rng.choice(before if c < at else after, 20) for c in range(8)]
        changes = change_points(cycles, seed=seed)
        errors.append(min((abs(change.at - at) for change in changes), default=None))
        same = [rng.choice(before, 20) for _ in range(8)]
        false += len(change_points(same, seed=seed)) > 0
    return {"errors": errors, "false": false, "of": len(errors)}


# ------------------------------------------------------------------ toy


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


def toy(seed: int) -> dict[str, Any]:
    known, _, _ = coordination(240, 100 + seed)
    held_out, conventions, roles = coordination(120, 200 + seed)
    result: dict[str, Any] = {"seed": seed}
    for name, hierarchical in (("hierarchical", True), ("flat", False)):
        options = LatentOptions(hierarchical=hierarchical)
        found = Behaviours.fit(known, count=3, local_count=2, options=options, seed=seed)
        joint, local = found.assign(held_out), found.assign_local(held_out)
        if not hierarchical:
            means = [found.latents(own)[1].mean(1) for own in (known, held_out)]
            joint = KMeans(3, n_init=10, random_state=seed).fit(means[0]).predict(means[1])
        result[name] = {
            "convention": adjusted_rand_score(conventions, joint),
            "role": adjusted_rand_score(roles.ravel(), local.ravel()),
        }
    return result


# ------------------------------------------------------------------ all


def cell(folder: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = folder / "cells" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute()))
        print(name, file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def table(mixed: list[dict[str, Any]], toys: list[dict[str, Any]]) -> str:
    lines = []
    if mixed:
        lines += [
            "| seed | ARI with the policies | errors of changes, cycles | found without a switch |"
        ]
        lines += ["|---|---|---|---|"]
    for one in mixed:
        told = one["switches"]
        errors = ", ".join("none found" if e is None else str(e) for e in told["errors"])
        lines.append(
            f"| {one['seed']} | {one['ari']:.2f} | {errors} | {told['false']} of {told['of']} |"
        )
    pairs = [
        adjusted_rand_score(a["labels"], b["labels"])
        for i, a in enumerate(mixed)
        for b in mixed[:i]
    ]
    if pairs:
        lines += ["", "ARI between seeds: " + ", ".join(f"{pair:.2f}" for pair in pairs)]
    if mixed:
        lines += ["", "Held-out episodes of the first seed, policies by behaviours:", ""]
        lines += ["| policy | " + " | ".join(mixed[0]["names"]) + " |"]
        lines += ["|---" * (len(POLICIES) + 1) + "|"]
        lines += [
            f"| {p} | " + " | ".join(map(str, row)) + " |"
            for p, row in zip(POLICIES, mixed[0]["table"], strict=True)
        ]
    if toys:
        lines += [
            "",
            "| toy, seed | joint: convention | local: role | flat: convention | flat: role |",
        ]
        lines += ["|---|---|---|---|---|"]
    for one in toys:
        both = [one[n][key] for n in ("hierarchical", "flat") for key in ("convention", "role")]
        lines.append(f"| {one['seed']} | " + " | ".join(f"{x:.2f}" for x in both) + " |")
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=60, help="episodes of a policy to fit on")
    parser.add_argument("--output", type=Path, default=Path("runs/behaviours"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    toys = [cell(args.output, f"toy {seed}", partial(toy, seed)) for seed in range(args.seeds)]
    mixed = [
        cell(args.output, f"mixture {seed}", partial(mixture, args.output, seed, args.each))
        for seed in range(args.seeds)
    ]
    print(table(mixed, toys))
    if args.json:
        result = {"environment": environment(), "mixture": mixed, "toy": toys}
        args.json.write_text(json.dumps(result) + "\n")
        args.json.with_suffix(".md").write_text(table(mixed, toys) + "\n")


if __name__ == "__main__":
    main()
