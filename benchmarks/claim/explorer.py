"""Explore with an optimistic policy, ship the pessimistic one: OPARL's claim on two small tasks.

    python benchmarks/claim/explorer.py --seeds 10 --json benchmarks/results/explorer.json

It resumes. OPARL (arXiv 2312.15965) in miniature: an ensemble of critics, a pessimistic actor that
climbs their least value and an optimistic one that climbs their largest; the optimistic one is set
to the pessimistic one every K updates; they act in turn, and the pessimistic one is shipped. They
act in turn by *episode*, as a dialogue's prefix asks for. The critics are diverse: each learns
from a bootstrap of its own, has a random prior function (arXiv 1806.03335), and looks ahead by
itself. OPARL's own all learn towards the least of them (``shared target``).

    deep sea        N steps down, each to the left or the right: right costs 0.01 / N, and pays 1
                    after N of N; left pays nothing. 2^N courses, one of them good. Tabular Q.
    mountain car    gymnasium's MountainCarContinuous-v0: fuel costs, the flag pays 100. TD3; an
                    action is held for five steps.

``pessimistic`` has the same critics and the pessimistic actor alone, whose noise is TD3's in the
car and ε = 0.1 in the sea. Measured: episodes to the first success of whoever acts, and to stable
success of the policy that would be shipped, ten noiseless episodes in a row, one after each
episode. A run that does not get there counts as the limit + 1. The settings were chosen on seeds
from 1000 on, which are not reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent.evaluation import bootstrap

Array = NDArray[Any]


@dataclass(frozen=True)
class Arm:
    """Of one way to explore."""

    explorer: bool = True
    critics: int = 5
    diverse: bool = True
    reset: bool = True
    shared: bool = False


ARMS = {
    "pessimistic": Arm(explorer=False),
    "explorer": Arm(),
    "explorer, no reset": Arm(reset=False),
    "explorer, shared target": Arm(shared=True),
    "explorer, critics alike": Arm(diverse=False),
    "explorer, one critic": Arm(critics=1),
}
SEA_LIMIT, CAR_LIMIT, STABLE, HELD, RESET = 2000, 50, 10, 5, 1000


# ------------------------------------------------------------------ the deep sea


def run_sea(arm: Arm, seed: int, size: int) -> dict[str, Any]:
    """Tabular Q of E critics over (step, column), each episode swept backwards."""
    draws, E = np.random.default_rng((seed, size)), arm.critics
    scale = 1.0 if arm.diverse else 0.0  # of the prior functions: the reward's own
    prior_ETCA = scale * draws.normal(size=(E, size, size, 2))
    q_ETCA = prior_ETCA + 0.01 * draws.normal(size=prior_ETCA.shape)
    first, stable, streak, spread = None, None, 0, []
    explorer_TCA = q_ETCA.min(0)
    for episode in range(SEA_LIMIT):
        if arm.reset and episode % 50 == 0:
            explorer_TCA = q_ETCA.min(0)
        else:  # slowly, as an actor of few steps of gradient follows
            explorer_TCA = 0.5 * (explorer_TCA + q_ETCA.max(0))
        exploring = arm.explorer and episode % 2 == 1
        acting_TCA, noise = (explorer_TCA, 0.0) if exploring else (q_ETCA.min(0), 0.1)
        columns, actions, reached = sea_episode(acting_TCA, noise, draws)
        if reached and first is None:
            first = episode + 1
        learns_E = draws.random(E) < 0.7 if arm.diverse else np.ones(E, bool)
        for step in reversed(range(size)):
            c, a = columns[step], actions[step]
            reward = -0.01 / size * a + (1.0 if reached and step == size - 1 else 0.0)
            ahead_E: Any = 0.0
            if step + 1 < size:
                next_EA = q_ETCA[:, step + 1, columns[step + 1]]
                ahead_E = next_EA.min(0).max() if arm.shared else next_EA.max(1)
            q_E = q_ETCA[:, step, c, a]
            q_ETCA[:, step, c, a] = q_E + 0.5 * learns_E * (reward + ahead_E - q_E)
        spread.append(float(q_ETCA.std(0).mean()))
        streak = streak + 1 if sea_episode(q_ETCA.min(0), 0.0, draws)[2] else 0
        if streak == STABLE:
            stable = episode + 1
            break
    return {"first": first, "stable": stable, "spread": float(np.mean(spread))}


def sea_episode(
    value_TCA: Array, noise: float, draws: np.random.Generator
) -> tuple[list[int], list[int], bool]:
    """The columns, the actions, and whether all of them were to the right."""
    column, columns, actions = 0, [], []
    for value_CA in value_TCA:
        action = int(value_CA[column].argmax())
        if draws.random() < noise:
            action = int(draws.integers(2))
        columns.append(column)
        actions.append(action)
        column = min(column + 1, len(value_CA) - 1) if action else max(column - 1, 0)
    return columns, actions, all(actions)


# ------------------------------------------------------------------ the car


class Critics(nn.Module):
    """E values of (s, a), each a small network with a fixed random one added; all at once."""

    def __init__(self, count: int, prior: float, width: int = 64) -> None:
        super().__init__()
        self.prior = prior
        sizes = [(3, width), (width, width), (width, 1)]

        def layers() -> nn.ParameterList:
            weights = [torch.randn(count, a, b) / a**0.5 for a, b in sizes]
            return nn.ParameterList(
                t
                for (_, b), w in zip(sizes, weights, strict=True)
                for t in (w, torch.zeros(count, 1, b))
            )

        self.own, self.fixed = layers(), layers().requires_grad_(False)

    def forward(self, state_BS: Tensor, action_BA: Tensor) -> Tensor:
        """(E, B)."""
        x = torch.cat([state_BS, action_BA], 1)
        found = _layers(x, self.own)
        if self.prior:
            found = found + self.prior * _layers(x, self.fixed)
        return found


def _layers(x: Tensor, parts: Any) -> Tensor:
    x = x.expand(parts[0].shape[0], *x.shape)
    for place in range(0, len(parts), 2):
        x = torch.baddbmm(parts[place + 1], x, parts[place])
        if place + 2 < len(parts):
            x = torch.relu(x)
    return x.squeeze(2)


def _actor(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1),
        nn.Tanh(),
    )


def _copy(into: nn.Module, of: nn.Module, share: float = 1.0) -> None:
    with torch.no_grad():
        for mine, other in zip(into.parameters(), of.parameters(), strict=True):
            mine.lerp_(other, share)


class OPARL:
    """TD3 with the critics' least value as the target, and two actors."""

    def __init__(self, arm: Arm, seed: int) -> None:
        torch.manual_seed(seed)
        self.arm, prior = arm, 3.0 if arm.diverse else 0.0
        self.critics, self.ahead = Critics(arm.critics, prior), Critics(arm.critics, prior)
        self.ahead.load_state_dict(self.critics.state_dict())
        self.learner, self.learner_ahead, self.explorer = _actor(), _actor(), _actor()
        _copy(self.learner_ahead, self.learner)
        _copy(self.explorer, self.learner)
        self._moves_critics = torch.optim.Adam(self.critics.own.parameters(), 1e-3)
        self._moves = {
            actor: torch.optim.Adam(actor.parameters(), 1e-3)
            for actor in (self.learner, self.explorer)
        }
        self.updates = 0

    def act(self, state: Array, exploring: bool, draws: np.random.Generator | None) -> Array:
        actor = self.explorer if exploring else self.learner
        with torch.no_grad():
            action = actor(torch.from_numpy(state)).numpy()
        if draws is not None:
            action = action + 0.1 * draws.standard_normal(1)
        return np.clip(action, -1, 1).astype(np.float32)

    def update(self, batch: tuple[Tensor, ...]) -> float:
        state, action, reward, after, end, weight_EB = batch
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            onward = (self.learner_ahead(after) + noise).clamp(-1, 1)
            ahead_EB = self.ahead(after, onward)
            if self.arm.shared:
                ahead_EB = ahead_EB.min(0).values
            target = reward + 0.99 * (1 - end) * ahead_EB
        q_EB = self.critics(state, action)
        loss = (weight_EB * (q_EB - target) ** 2).mean(1).sum()
        self._moves_critics.zero_grad()
        loss.backward()
        self._moves_critics.step()
        self.updates += 1
        if self.updates % 2 == 0:
            self._climb(self.learner, lambda q_EB: q_EB.min(0).values, state)
            if self.arm.explorer:
                self._climb(self.explorer, lambda q_EB: q_EB.max(0).values, state)
            _copy(self.ahead.own, self.critics.own, 0.005)
            _copy(self.learner_ahead, self.learner, 0.005)
        if self.arm.reset and self.updates % RESET == 0:
            _copy(self.explorer, self.learner)
        return float(q_EB.detach().std(0, correction=0).mean())

    def _climb(self, actor: nn.Module, aggregate: Any, state: Tensor) -> None:
        loss = -aggregate(self.critics(state, actor(state))).mean()
        self._moves[actor].zero_grad()
        loss.backward()
        self._moves[actor].step()


def run_car(arm: Arm, seed: int) -> dict[str, Any]:
    """Episodes of MountainCarContinuous, an update every other step."""
    import gymnasium

    env, shown = (gymnasium.make("MountainCarContinuous-v0") for _ in range(2))
    draws, agent = np.random.default_rng(seed), OPARL(arm, seed)
    scale = np.array([1.0, 20.0], np.float32)
    size = CAR_LIMIT * 1000 // HELD
    store = [np.zeros((size, n), np.float32) for n in (2, 1, 1, 2, 1, arm.critics)]
    count, first, stable, streak, spread = 0, None, None, 0, []
    seen = set()
    for episode in range(CAR_LIMIT):
        exploring = arm.explorer and episode % 2 == 1
        state, over = env.reset(seed=1000 * seed + episode)[0] * scale, False
        weight_E = draws.poisson(1.0, arm.critics) if arm.diverse else np.ones(arm.critics)
        while not over:
            action = agent.act(state, exploring, draws)
            after, reward, end, over = _held(env, action)
            after = after * scale
            row = (state, action, [reward / 10], after, [end], weight_E)
            for column, value in zip(store, row, strict=True):
                column[count] = value
            count, state = count + 1, after
            seen.add((int(after[0] * 20), int(after[1] * 20)))
            if count >= 400 and count % 2 == 0:
                rows = draws.integers(count, size=128)
                s, a, r, s2, e, w = (torch.from_numpy(column[rows]) for column in store)
                spread.append(agent.update((s, a, r[:, 0], s2, e[:, 0], w.T)))
        if end and first is None:
            first = episode + 1
        streak = streak + 1 if _flag(agent, shown, 5_000 + episode, scale) else 0
        if streak == STABLE:
            stable = episode + 1
            break
    return {
        "first": first,
        "stable": stable,
        "spread": float(np.mean(spread)),
        "states": len(seen),
        "episodes": episode + 1,
    }


def _flag(agent: OPARL, env: Any, seed: int, scale: Array) -> bool:
    """Whether the learner, without noise, reaches the flag."""
    state, over, end = env.reset(seed=seed)[0] * scale, False, False
    while not over:
        after, _, end, over = _held(env, agent.act(state, False, None))
        state = after * scale
    return end


def _held(env: Any, action: Array) -> tuple[Array, float, bool, bool]:
    """What an action leads to that is held: the state, the sum of rewards, the flag, the end."""
    total = 0.0
    for _ in range(HELD):
        after, reward, end, cut, _ = env.step(action)
        total += float(reward)
        if end or cut:
            break
    return after, total, bool(end), bool(end or cut)


# ------------------------------------------------------------------ all of it


def cell(task: str, name: str, seed: int) -> dict[str, Any]:
    arm = ARMS[name]
    found = (
        run_car(arm, seed) if task == "mountain car" else run_sea(arm, seed, int(task.split()[-1]))
    )
    return {"task": task, "arm": name, "seed": seed, **found}


def table(cells: list[dict[str, Any]]) -> str:
    """Of each task and arm: medians, how many got there, and differences paired by seed."""
    lines = ["| task | arm | runs | first success: median | in | stable: median | in | spread |"]
    lines.append("|---" * 8 + "|")
    rows = dict.fromkeys((c["task"], c["arm"]) for c in cells)

    def episodes(task: str, arm: str, name: str) -> Array:
        limit = CAR_LIMIT if task == "mountain car" else SEA_LIMIT
        own = [c for c in cells if (c["task"], c["arm"]) == (task, arm)]
        return np.array([c[name] or limit + 1 for c in sorted(own, key=lambda c: c["seed"])])

    for task, arm in rows:
        own = [c for c in cells if (c["task"], c["arm"]) == (task, arm)]
        parts = [
            f"{np.median(episodes(task, arm, name)):.0f} | {sum(c[name] is not None for c in own)}"
            for name in ("first", "stable")
        ]
        spread = np.mean([c["spread"] for c in own])
        lines.append(f"| {task} | {arm} | {len(own)} | {' | '.join(parts)} | {spread:.3f} |")
    lines += ["", "| episodes less than pessimistic | task | first | stable |", "|---" * 4 + "|"]
    for task, arm in rows:
        if arm == "pessimistic" or (task, "pessimistic") not in rows:
            continue
        texts = []
        for name in ("first", "stable"):
            apart = episodes(task, arm, name) - episodes(task, "pessimistic", name)
            found = bootstrap(apart.tolist())
            low, high = (found.mean if x is None else x for x in (found.low, found.high))
            texts.append(f"{found.mean:+.1f} ({low:+.1f} … {high:+.1f})")
        lines.append(f"| {arm} | {task} | {' | '.join(texts)} |")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Each run as a point: the episodes to stable success, by task and arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(c["task"] for c in cells))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 2.8), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        limit = CAR_LIMIT if task == "mountain car" else SEA_LIMIT
        arms = [arm for arm in ARMS if any((c["task"], c["arm"]) == (task, arm) for c in cells)]
        for row, arm in enumerate(arms):
            own = [c["stable"] or limit for c in cells if (c["task"], c["arm"]) == (task, arm)]
            axis.plot(own, [row] * len(own), "o", alpha=0.4, color="#2f6f9f")
            axis.plot([np.median(own)], [row], "|", markersize=18, color="#1f2933")
        axis.set_yticks(range(len(arms)), arms)
        axis.invert_yaxis()
        axis.set_title(task, fontsize=10)
        axis.set_xlabel(f"episodes (limit {limit})")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["deep sea 8", "deep sea 12", "mountain car"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--json", type=Path, help="cells are kept here as they end; a .md beside it"
    )
    parser.add_argument("--figure", type=Path, help="draw the cells here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.json
    cells = json.loads(path.read_text())["cells"] if path and path.exists() else []
    for task in args.tasks:
        for seed in range(args.first, args.first + args.seeds):
            for arm in args.arms:
                if any((c["task"], c["arm"], c["seed"]) == (task, arm, seed) for c in cells):
                    continue
                started = time.monotonic()
                cells.append(cell(task, arm, seed))
                if not task.startswith("deep sea"):
                    took = f"{time.monotonic() - started:.0f} s"
                    print(f"{cells[-1]}, {took}", file=sys.stderr, flush=True)
                if path:
                    path.write_text(
                        json.dumps({"environment": environment(), "cells": cells}) + "\n"
                    )
    print(table(cells))
    if path:
        path.with_suffix(".md").write_text(table(cells) + "\n")
    if args.figure:
        plot(cells, args.figure)


if __name__ == "__main__":
    main()
