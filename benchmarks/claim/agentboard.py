"""AgentBoard's claim in small: progress tells agents apart where none of them succeeds.

    python benchmarks/claim/agentboard.py --output runs/agentboard    # resumes

ScienceWorld's hard tasks (those of which the simulator lists 10 sub-goals or more), test split, 30
steps as AgentBoard allows. Agents: one that draws from the admissible actions, and the gold path
for its first 10 or 20 steps, after which the agent only looks around. No training is involved: the
unit is the episode, and all agents have the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent import envs
from stepagent.acting.rollout import run_episodes
from stepagent.envs import ExpertUnavailable, TextEnv
from stepagent.envs.scienceworld import TASKS
from stepagent.evaluation.agentboard import save_agentboard
from stepagent.evaluation.metrics import METRICS, compare, mean_progress_curve, summarize
from stepagent.records.episode_file import open_episodes
from stepagent.records.episodes import Episode

STEPS = 30
AGENTS = {"random": 0, "10 steps of the path": 10, "20 steps of the path": 20}
SHOWN = ("success", "progress_rate", "grounding_accuracy")


class Partly:
    """The expert for some steps, then a look around; for none, random admissible actions."""

    exact = True
    _KEPT = 5  # steps for which a list of actions serves: making one takes long

    def __init__(self, name: str, steps: int) -> None:
        self.name, self._steps = name, steps

    def begin(self, seeds: Sequence[int]) -> None:
        self._taken = [0] * len(seeds)
        self._draws = [np.random.default_rng(seed) for seed in seeds]
        self._lists: list[list[str]] = [[] for _ in seeds]

    def act(self, observations: Sequence[str], envs: Sequence[TextEnv]) -> list[str]:
        return [self._decide(row, env) for row, env in enumerate(envs)]

    def keep(self, rows: Sequence[int]) -> None:
        self._taken = [self._taken[row] for row in rows]
        self._draws = [self._draws[row] for row in rows]
        self._lists = [self._lists[row] for row in rows]

    def _decide(self, row: int, env: Any) -> str:
        step = self._taken[row]
        self._taken[row] += 1
        if step < self._steps:
            try:
                return str(env.expert_action())
            except ExpertUnavailable:
                return "look around"
        if self._steps:
            return "look around"
        if step % self._KEPT == 0:
            self._lists[row] = env.admissible_actions()
        return str(self._draws[row].choice(self._lists[row]))


def hard_seeds(env: TextEnv, variations: int) -> list[int]:
    """Of the hard tasks, their first variations in the split."""
    hard = [i for i in range(len(TASKS)) if env.reset(i)[1]["difficulty"] == "hard"]
    return [v * len(TASKS) + i for v in range(variations) for i in hard]


def play(folder: Path, name: str, seeds: list[int]) -> list[Episode]:
    """The agent's episodes; those in the file are there already."""
    path = folder / f"{name.replace(' ', '-')}.jsonl"
    with open_episodes(path, {"agent": name, "max_steps": STEPS}, seeds) as file:
        missing = [seed for seed in seeds if seed not in file.ended]
        run_episodes(
            envs.factory("scienceworld", "test"),
            Partly(name, AGENTS[name]),  # type: ignore[arg-type]
            missing,
            max_steps=STEPS,
            batch_size=4,
            split="test",
            on_end=file.append,
            progress=name,
        )
        return [file.ended[seed] for seed in seeds]


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{result['episodes']} episodes of ScienceWorld's {result['tasks']} hard tasks, "
        f"{STEPS} steps, in %:",
        "",
        "| agent | success | progress | grounding |",
        "|---|---|---|---|",
    ]
    for name, metrics in [*result["agents"].items(), *result["differences"].items()]:
        cells = []
        for metric in SHOWN:
            found, sign = metrics[metric], "+" if "−" in name else ""
            ends = [found["low"], found["high"]]
            bounds = "" if None in ends else f" ({ends[0]:{sign}.1%} … {ends[1]:{sign}.1%})"
            cells.append(f"{found['mean']:{sign}.1%}{bounds}".replace("%", ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(path: Path, found: dict[str, list[Episode]]) -> None:
    """Progress by step; success, where any is, in the label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for name, episodes in found.items():
        done = np.mean([episode.success for episode in episodes])
        curve = 100 * mean_progress_curve(episodes, STEPS)
        axes.plot(range(STEPS + 1), curve, linewidth=1.6, label=f"{name} (success {done:.0%})")
    axes.set_xlabel("step")
    axes.set_ylabel("progress, %")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variations", type=int, default=3, help="of each task")
    parser.add_argument("--output", type=Path, default=Path("runs/agentboard"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    parser.add_argument("--picture", type=Path, help="draw progress by step")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with closing(envs.make("scienceworld", "test")) as env:  # which keeps Java, and its gold paths
        seeds = hard_seeds(env, args.variations)
        found = {name: play(args.output, name, seeds) for name in AGENTS}
    for name, episodes in found.items():
        save_agentboard(args.output / "results" / name.replace(" ", "-"), episodes)

    def told(metrics: dict[str, Any]) -> dict[str, Any]:
        return {name: vars(metrics[name]) for name in METRICS if name in SHOWN}

    result = {
        "environment": environment(),
        "episodes": len(seeds),
        "tasks": len({episode.task for episode in found["random"]}),
        "agents": {name: told(summarize(own).metrics) for name, own in found.items()},
        "differences": {
            f"{b} − {a}": told(compare(found[b], found[a]).differences)
            for a, b in combinations(AGENTS, 2)
        },
    }
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
        args.json.with_suffix(".md").write_text(table(result) + "\n")
    if args.picture:
        picture(args.picture, found)


if __name__ == "__main__":
    main()
