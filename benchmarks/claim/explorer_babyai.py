"""Explore with one adapter, ship another: what that visits on BabyAI, and what it costs.

    python benchmarks/claim/explorer_babyai.py --runs 5 --output runs/explorer_babyai     # resumes

A run has demonstrations, initial weights and an order of data of its own, and its SFT model is the
base of all of its arms. These train an adapter by ``method="inverse"`` at the agent's states, with
the same ensemble of discriminators, the same tasks, as many rollouts and as many updates of what is
shipped. With an explorer, every other rollout is its.

Measured: *states*, how many different observations were acted at in all rollouts of the training,
and how many of different tasks (``task, observation``); steps in all of them; success of the greedy
policy that is shipped, on episodes that nothing was chosen on. The unit is the run
(`stepagent.evaluation.bootstrap_runs`); differences are paired within runs. Dev runs, by which the
settings were chosen, have other seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import environment
from rivals import DEV_RUNS, Cell, Run

from stepagent import envs
from stepagent.evaluation import bootstrap_runs
from stepagent.learning.trainer import StepAgentTrainer

LEVEL, DEMONSTRATIONS = "babyai:GoToLocalS6N2", 48
_INVERSE: dict[str, Any] = {
    **{"method": "inverse", "states": "agent", "gamma": 0.0, "learning_rate": 2e-3},
    **{"discriminators": 5, "discriminator_diversity": 1.0, "critic_epochs": 4},
    # A body that is trained learns away what the random functions differ by.
    "discriminator_body": "frozen",
}
_EXPLORER, _DIVERSE = {"explorer": "optimistic"}, {"discriminator_diversity": 4.0}
_OWN = {"discriminator_body": "own"}
ARMS: dict[str, dict[str, Any]] = {
    "learner alone": _INVERSE,
    "learner and explorer": _INVERSE | _EXPLORER,
    "optimist alone": _INVERSE | {"reward_aggregate": "optimistic"},
    "learner alone, diversity 4": _INVERSE | _DIVERSE,
    "learner and explorer, diversity 4": _INVERSE | _DIVERSE | _EXPLORER,
    "learner alone, own body": _INVERSE | _OWN,
    "learner and explorer, own body": _INVERSE | _OWN | _EXPLORER,
}
# What is compared with what. Those with options in their names were added once the others were
# known, to see what a larger spread does, and what is lost where the learner learns.
PAIRS = (
    ("SFT", "learner alone"),
    ("learner and explorer", "learner alone"),
    ("optimist alone", "learner alone"),
    ("learner and explorer, diversity 4", "learner alone, diversity 4"),
    ("SFT", "learner alone, own body"),
    ("learner and explorer, own body", "learner alone, own body"),
)
MEASURES = {
    "success": ("success, points", 100.0),
    "states": ("states", 1.0),
    "task_states": ("states of tasks", 1.0),
    "steps": ("steps", 1.0),
}
_LOGGED = ("cycle", "discriminator_spread", "explorer_bounded", "clip_fraction")
_LOGGED += ("learner_reward", "explorer_reward", "learner_states", "explorer_states")
_COLUMNS = {"states": ",.0f", "task_states": ",.0f", "steps": ",.0f", "spread": ".2f"}
_COLUMNS |= {"seconds": ".0f"}


class Visited:
    """An environment as it is, beside what is acted at in it."""

    def __init__(self, seen: list[tuple[int, str]]) -> None:
        self._env, self._seen = envs.make(LEVEL), seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the episode of this seed."""
        self._seed = seed
        self._shown, info = self._env.reset(seed)
        return self._shown, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """A step; where it was taken is noted."""
        self._seen.append((self._seed, self._shown))
        found = self._env.step(action)
        self._shown = found[0]
        return found


class ExplorerRun(Run):
    """A run of `rivals.py` whose arms train an adapter."""

    def __init__(self, cell: Cell, output: Path) -> None:
        super().__init__(cell, output, None)
        self.setting = replace(
            self.setting, hidden_size=64, sft_epochs=30, cycles=6, epochs_per_cycle=2
        )
        self.seen: list[tuple[int, str]] = []

    def env(self, part: int) -> Any:
        """As there; what is acted at in training is noted."""
        return super().env(part) if part else lambda: Visited(self.seen)

    def sft(self) -> Any:
        """The base, with the adapter that an arm trains."""
        base = super().sft()
        torch.manual_seed(self.cell.run)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, lora)

    def _trainer(self, model: Any, options: dict[str, Any]) -> StepAgentTrainer:
        self.trainer = super()._trainer(model, options)
        return self.trainer


def run_cell(cell: Cell, output: Path) -> dict[str, Any]:
    """Train and measure one cell, unless it is measured."""
    path = cell.file(output)
    if path.exists():
        return json.loads(path.read_text())
    run = ExplorerRun(cell, output)
    if cell.arm == "SFT":
        result = {**asdict(cell), "success": run.measure(run.sft())["success"]}
    else:
        trained, costs = run.train(ARMS[cell.arm])
        cycles = [entry for entry in run.trainer.state.log_history if "cycle" in entry]
        result = {
            **asdict(cell),
            "seconds": costs["seconds"],
            "success": run.measure(trained)["success"],
            "states": len({shown for _, shown in run.seen}),
            "task_states": len(set(run.seen)),
            "steps": len(run.seen),
            "spread": float(np.mean([entry["discriminator_spread"] for entry in cycles])),
            "cycles": [{n: entry[n] for n in _LOGGED if n in entry} for entry in cycles],
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    told = {name: round(float(np.mean(result[name])), 3) for name in MEASURES if name in result}
    print(f"run {cell.run}, {cell.arm}: {told}", file=sys.stderr, flush=True)
    return result


def table(cells: list[dict[str, Any]]) -> str:
    """The mean of each arm, and the differences of `PAIRS` with intervals over runs."""
    arms = [arm for arm in ("SFT", *ARMS) if any(c["arm"] == arm for c in cells)]
    lines = ["| arm | runs | success, % | states | states of tasks | steps | spread | seconds |"]
    lines.append("|---" * 8 + "|")
    for arm in arms:
        own = [c for c in cells if c["arm"] == arm]
        means = [f"{100 * np.mean([np.mean(c['success']) for c in own]):.1f}"]
        for name, form in _COLUMNS.items():
            means.append(format(np.mean([c[name] for c in own]), form) if name in own[0] else "")
        lines.append(f"| {arm} | {len(own)} | " + " | ".join(means) + " |")
    lines += ["", "| difference | of | mean | 95 % interval | per run |", "|---" * 5 + "|"]
    for arm, rival in PAIRS:
        for name, (label, scale) in MEASURES.items():
            if row := _difference(cells, (arm, rival), name, scale):
                lines.append(f"| {arm} − {rival} | {label} | {row} |")
    return "\n".join(lines)


def _difference(
    cells: list[dict[str, Any]], pair: tuple[str, str], name: str, scale: float
) -> str | None:
    values = {(c["run"], c["arm"]): scale * np.atleast_1d(c[name]) for c in cells if name in c}
    runs = [r for r in sorted({r for r, _ in values}) if all((r, arm) in values for arm in pair)]
    if not runs:
        return None
    found = bootstrap_runs([values[run, pair[0]] - values[run, pair[1]] for run in runs])
    interval = "" if found.low is None else f"{found.low:+.1f} … {found.high:+.1f}"
    return f"{found.mean:+.1f} | {interval} | {', '.join(f'{d:+.1f}' for d in found.per_run)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=["SFT", *ARMS], default=["SFT", *ARMS])
    parser.add_argument("--dev", action="store_true", help="dev runs, on the dev episodes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/explorer_babyai"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    first = DEV_RUNS if args.dev else 0
    cells = [
        run_cell(Cell(LEVEL, DEMONSTRATIONS, run, arm, args.dev), args.output)
        for run in range(first, first + args.runs)
        for arm in args.arms
    ]
    print(table(cells))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "cells": cells}) + "\n")
        args.json.with_suffix(".md").write_text(table(cells) + "\n")


if __name__ == "__main__":
    main()
