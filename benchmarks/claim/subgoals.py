"""Sub-goals: do phases follow true progress, and does a learner shaped by them need fewer steps?

    python benchmarks/claim/subgoals.py --runs 5 --output runs/subgoals    # resumes

**Order.** Phases are fitted on two thirds of an expert's successful episodes and compared with the
environment's own progress on the others: Spearman's rank correlation within each episode, whose
mean is the figure. Phases read an observation's own text and no position. Two controls say that
they are no clock: fitted on demonstrations whose states were shuffled, and compared, in held-out
episodes whose states were shuffled, with the place of a state instead of its progress. First and
last observations are easily told (a task's statement; its end), so the figure without them stands
beside, and what an oracle reaches that knows the mean progress of every text, as much as one
observation can tell. TextWorld's games of many seeds have a layout each; in "one game" the expert,
a fifth of whose actions are random, plays the same game.

**Shaping.** A grid with a key, a locked door and a goal, told in text; 1 at the goal and 0 before.
Tabular Q-learning with the outcome alone, with γ Φ(s') − Φ(s) added, and with the potentials of the
phases permuted. Phases are those of 30 demonstrations of the same layout, a quarter of whose
actions are random. A run has its own layout, demonstrations and seed, and is the unit. The figure
is environment steps until 18 of the last 20 training episodes reached the goal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent.acting.policies import ExpertPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.analysis import ContrastOptions, Subgoals
from stepagent.data.trajectory import save_trajectories
from stepagent.envs import factory
from stepagent.evaluation import bootstrap_runs
from stepagent.records.episodes import Episode, load_episodes

# ------------------------------------------------------------------ data


class NoisyExpert(ExpertPolicy):
    """The expert, in whose place an action is drawn now and then."""

    def __init__(self, noise: float, seed: int) -> None:
        self.name = "noisy expert"
        self._noise, self._rng = noise, np.random.default_rng(seed)

    def act(self, observations: Sequence[str], envs: Sequence[Any]) -> list[str | None]:
        found = super().act(observations, envs)
        for place, env in enumerate(envs):
            if self._rng.random() < self._noise:
                choices = env.actions or env.admissible_actions()
                found[place] = choices[int(self._rng.integers(len(choices)))]
        return found


class OneSeed:
    """An environment whose every episode is that of one seed."""

    def __init__(self, make: Callable[[], Any], seed: int) -> None:
        self._env, self._seed = make(), seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def check_seed(self, seed: int) -> None:
        """Each seed is an episode of the one."""

    def prepare(self, seeds: Sequence[int]) -> None:
        """Nothing more than one episode needs."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        return self._env.reset(self._seed)


DATA: dict[str, dict[str, Any]] = {
    "textworld easy, one game": {"env": "textworld:easy", "one": 2, "seeds": 45, "others": 4},
    "textworld hard, one game": {"env": "textworld:hard", "one": 0, "seeds": 45, "others": 4},
    "textworld easy, many games": {"env": "textworld:easy", "seeds": 60, "others": 0},
    "scienceworld find-living-thing": {
        **{"env": "scienceworld:find-living-thing", "seeds": 24, "others": 4},
    },
}


def demonstrations(name: str, folder: Path) -> list[Episode]:
    """The expert's successful episodes, kept in the folder."""
    told, path = DATA[name], folder / f"{name}.jsonl"
    if not path.exists():
        make = factory(told["env"])
        if "one" in told:
            make, policy = partial(OneSeed, make, told["one"]), NoisyExpert(0.2, 0)
        else:
            policy = ExpertPolicy()
        found = run_episodes(make, policy, range(told["seeds"]), max_steps=60)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trajectories(path, [e.trajectory() for e in found if e.success])
    return load_episodes(path)


# ------------------------------------------------------------------ order


def order(name: str, phases: int, folder: Path) -> dict[str, Any]:
    episodes = demonstrations(name, folder)
    rng = np.random.default_rng(0)
    episodes = [episodes[i] for i in rng.permutation(len(episodes))]
    split = 2 * len(episodes) // 3
    fit = partial(Subgoals.fit, options=ContrastOptions(others=DATA[name]["others"]))
    known, held_out = episodes[:split], episodes[split:]
    phases = min(phases, len({text for e in known for text in _texts(e)}))
    real = fit(known, phases=phases)
    lost = fit([shuffled(e, rng) for e in known], phases=phases)
    return {
        "data": name,
        "fitted on": len(known),
        "held out": len(held_out),
        "phases": phases,
        "spearman": [rank(real.phases(e), _progress(e)) for e in held_out],
        "inner": [rank(real.phases(e)[1:-1], _progress(e)[1:-1]) for e in held_out],
        "fitted on shuffled": [rank(lost.phases(e), _progress(e)) for e in held_out],
        "place, shuffled": [
            rank(real.phases(shuffled(e, rng)), range(len(e.actions) + 1)) for e in held_out
        ],
        "told": most_told(episodes),
        "names": list(real.names),
    }


def most_told(episodes: list[Episode]) -> list[float | None]:
    """Of each episode, the rank correlation of progress with the mean progress of all states of the
    same text: what no function of one observation's text is to exceed by more than chance."""
    known: dict[str, list[float]] = defaultdict(list)
    for e in episodes:
        for text, progress in zip(_texts(e), _progress(e), strict=True):
            known[text].append(progress)
    return [rank([float(np.mean(known[t])) for t in _texts(e)], _progress(e)) for e in episodes]


def _texts(episode: Episode) -> list[str]:
    return [*episode.observations, str(episode.last_observation)]


def _progress(episode: Episode) -> list[float]:
    return [0.0, *episode.progress]


def shuffled(episode: Episode, rng: np.random.Generator) -> Episode:
    """Its states in another order."""
    texts = _texts(episode)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    fields = {**vars(episode), "observations": texts[:-1], "last_observation": texts[-1]}
    return Episode(**fields)


def rank(phases: Sequence[int], true: Sequence[float]) -> float | None:
    """Spearman's correlation: 0 for one phase throughout, None where the truth does not move."""
    if len(set(true)) < 2:
        return None
    return float(spearmanr(phases, true).statistic) if len(set(phases)) > 1 else 0.0


# ------------------------------------------------------------------ shaping


class KeyAndDoor:
    """A grid in two halves: a key on the near side, a locked door, the goal beyond. In text."""

    ACTIONS = ("north", "south", "west", "east", "take", "unlock")
    SIZE, MAX_STEPS = 9, 150

    def __init__(self, layout: int) -> None:
        rng = np.random.default_rng(layout)
        half = self.SIZE // 2
        self._door = (int(rng.integers(self.SIZE)), half)
        cells = [(r, c) for r in range(self.SIZE) for c in range(half)]
        places = rng.permutation(len(cells))
        self._start, self._key = cells[places[0]], cells[places[1]]
        self._goal = (int(rng.integers(self.SIZE)), int(rng.integers(half + 2, self.SIZE)))

    def reset(self) -> str:
        self._at, self._has_key, self._open, self._steps = self._start, False, False, 0
        return self._text()

    def step(self, action: str) -> tuple[str, bool, bool]:
        """The observation, whether the goal is reached, whether time is up."""
        self._at, self._has_key, self._open = self._next(self._state, action)
        self._steps += 1
        return self._text(), self._at == self._goal, self._steps >= self.MAX_STEPS

    @property
    def _state(self) -> tuple[tuple[int, int], bool, bool]:
        return self._at, self._has_key, self._open

    def _next(self, state: Any, action: str) -> tuple[tuple[int, int], bool, bool]:
        (row, column), key, opened = state
        if action == "take":
            return state[0], key or state[0] == self._key, opened
        if action == "unlock":
            beside = abs(row - self._door[0]) + abs(column - self._door[1]) == 1
            return state[0], key, opened or (key and beside)
        moves = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
        to = row + moves[action][0], column + moves[action][1]
        inside = 0 <= to[0] < self.SIZE and 0 <= to[1] < self.SIZE
        wall = to[1] == self._door[1] and not (opened and to == self._door)
        return (to if inside and not wall else state[0]), key, opened

    def expert_action(self) -> str:
        """The first action of a shortest way."""
        seen, queue = {self._state}, deque([(self._state, "")])
        while queue:
            state, first = queue.popleft()
            if state[0] == self._goal:
                return first
            for action in self.ACTIONS:
                to = self._next(state, action)
                if to not in seen:
                    seen.add(to)
                    queue.append((to, first or action))
        raise ValueError("the goal must be reachable")

    def _text(self) -> str:
        row, column = self._at
        carried = "you carry the key" if self._has_key else "your hands are empty"
        door = "open" if self._open else "locked"
        return f"you stand in row {row} , column {column} . {carried} . the door is {door}"


def demonstrate(env: KeyAndDoor, count: int, noise: float, rng: np.random.Generator) -> list[Any]:
    found = []
    while len(found) < count:
        texts, actions, done, over = [env.reset()], [], False, False
        while not done and not over:
            drawn = str(rng.choice(env.ACTIONS)) if rng.random() < noise else env.expert_action()
            text, done, over = env.step(drawn)
            actions.append(drawn)
            texts.append(text)
        if done:
            made = Episode("key and door", len(found), observations=texts[:-1], actions=actions)
            made.last_observation, made.success = texts[-1], True
            found.append(made)
    return found


def steps_to_learn(
    env: KeyAndDoor, potential: Callable[[str], float], rng: np.random.Generator, budget: int
) -> int | None:
    """Of tabular Q-learning, until 18 of 20 episodes succeed; None beyond the budget."""
    values: dict[str, np.ndarray] = {}
    rate, discount, random, steps = 0.5, 0.98, 0.1, 0
    latest: deque[bool] = deque(maxlen=20)

    def of(text: str) -> np.ndarray:
        return values.setdefault(text, np.zeros(len(env.ACTIONS)))

    while steps < budget:
        text, done, over = env.reset(), False, False
        while not done and not over:
            own = of(text)
            best = np.flatnonzero(own == own.max())
            drawn = rng.integers(len(own)) if rng.random() < random else rng.choice(best)
            then, done, over = env.step(env.ACTIONS[drawn])
            ahead = 0.0 if done else discount * (of(then).max() + potential(then))
            own[drawn] += rate * (float(done) + ahead - potential(text) - own[drawn])
            text, steps = then, steps + 1
        latest.append(done)
        if sum(latest) >= 18:
            return steps
    return None


ARMS = ("outcome", "shaped", "permuted")


def shaping(run: int, arm: str, budget: int) -> dict[str, Any]:
    env = KeyAndDoor(run)
    potentials: dict[str, float] = {}
    if arm == "outcome":
        potential: Callable[[str], float] = lambda text: 0.0  # noqa: E731
    else:
        shown = demonstrate(env, 30, 0.25, np.random.default_rng(1000 + run))
        found = Subgoals.fit(shown, phases=10, options=ContrastOptions(near=2), seed=run)
        levels = found.potentials_K
        if arm == "permuted":
            levels = np.random.default_rng(run).permutation(levels)

        def potential(text: str) -> float:
            if text not in potentials:
                potentials[text] = float(levels[found.assign([text])[0]])
            return potentials[text]

    steps = steps_to_learn(env, potential, np.random.default_rng(run), budget)
    return {"run": run, "arm": arm, "budget": budget, "steps": steps}


# ------------------------------------------------------------------ all


def cell(folder: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = folder / "cells" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute()))
        print(name, file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def table(orders: list[dict[str, Any]], shaped: list[dict[str, Any]]) -> str:
    lines = ["| data | fitted on, held out | Spearman | without first and last |"]
    lines[0] += " fitted on shuffled states | with the place, states shuffled |"
    lines[0] += " the most that texts tell |"
    lines += ["|---|---|---|---|---|---|---|"]
    keys = ("spearman", "inner", "fitted on shuffled", "place, shuffled", "told")
    for one in orders:
        means = [_mean(one[key]) for key in keys]
        counts = f"{one['fitted on']}, {one['held out']}"
        lines.append(f"| {one['data']} | {counts} | " + " | ".join(means) + " |")
    if not shaped:
        return "\n".join(lines)
    runs = sorted({one["run"] for one in shaped})
    lines += [
        "",
        f"Steps to 18 of 20, of {len(runs)} runs; a run that did not get there counts its budget:",
        "",
    ]
    lines += ["| run | " + " | ".join(ARMS) + " | shaped / outcome |", "|---|---|---|---|---|"]
    steps = {(one["run"], one["arm"]): one["steps"] or one["budget"] for one in shaped}
    told = {(one["run"], one["arm"]): one["steps"] for one in shaped}
    shares = []
    for run in runs:
        shares.append(steps[run, "shaped"] / steps[run, "outcome"])
        cells = [str(told[run, arm] or f"> {steps[run, arm]}") for arm in ARMS]
        lines.append(f"| {run} | " + " | ".join(cells) + f" | {shares[-1]:.2f} |")
    found = bootstrap_runs([[share] for share in shares])
    bounds = "" if found.low is None else f" ({found.low:.2f} … {found.high:.2f})"
    lines.append(f"\nshaped / outcome, mean over runs: {found.mean:.2f}{bounds}")
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else "n/a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument("--phases", type=int, default=10)
    parser.add_argument("--budget", type=int, default=60_000, help="steps of a learner")
    parser.add_argument("--output", type=Path, default=Path("runs/subgoals"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    shaped = [
        cell(args.output, f"shaping {run} {arm}", partial(shaping, run, arm, args.budget))
        for run in range(args.runs)
        for arm in ARMS
    ]
    orders = [
        cell(args.output, f"order {name}", partial(order, name, args.phases, args.output))
        for name in args.data
    ]
    print(table(orders, shaped))
    if args.json:
        result = {"environment": environment(), "order": orders, "shaping": shaped}
        args.json.write_text(json.dumps(result) + "\n")
        args.json.with_suffix(".md").write_text(table(orders, shaped) + "\n")


if __name__ == "__main__":
    main()
