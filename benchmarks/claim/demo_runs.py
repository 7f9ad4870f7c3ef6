"""The demo over ten training runs an arm: which way to learn from the expert wins, and by how much?

    python benchmarks/claim/demo_runs.py --runs 10 --output runs/demo_runs        # resumes
    ATEN_CPU_CAPABILITY=default python benchmarks/claim/demo_runs.py --runs 10 --output runs/other

A run has demonstrations, initial weights and an order of data of its own. Its arms go on from the
same SFT model with the same number of updates, and are measured on the same 200 held-out episodes.
The unit is the run: intervals come from a bootstrap over runs and episodes in two levels
(`stepagent.evaluation.bootstrap_runs`). Under ``ATEN_CPU_CAPABILITY=default`` torch rounds
otherwise, as it does on another processor, and all runs are others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent.evaluation import RunsInterval, bootstrap_runs
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.tools import demo

_HALF = {"rollouts": 100, "epochs_per_cycle": 8}  # half of the answers, the same updates
_UNSURE = {"ask": "unsure", "ask_share": 0.5}  # the other half of the states is not asked at
# An arm is a stage of the demo with other options.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT continued": ("sft_continued", {}),
    "implicit": ("stepagent", {}),
    "DAgger": ("dagger", {}),
    "implicit, half the rollouts": ("stepagent", _HALF),
    "DAgger, half the rollouts": ("dagger", _HALF),
    "implicit, half the answers": ("stepagent", _UNSURE),
    "DAgger, half the answers": ("dagger", _UNSURE),
    "implicit, both states": ("stepagent", {"states": "mixed", "epochs_per_cycle": 2}),
    "inverse": ("inverse", {}),
    "implicit, expert's states": ("stepagent_expert_states", {"sft_weight": 0.0}),
    "inverse, expert's states": ("inverse_expert_states", {}),
}
RIVALS = ("SFT", "SFT continued", "DAgger")


def run_cell(
    folder: Path,
    run: int,
    arm: str,
    arms: Mapping[str, tuple[str, dict[str, Any]]] = ARMS,
    on_trained: Callable[[StepAgentTrainer], None] | None = None,
) -> dict[str, Any]:
    """Train and measure one arm of one run, or read it where it was measured."""
    path = folder / f"run{run}" / "cells" / f"{arm}.json"
    if path.exists():
        return json.loads(path.read_text())
    stages = demo.Demo(folder / f"run{run}", replace(demo.Settings(), seed=run), "implicit")
    stages.train_sft()
    model, result = stages.model("sft"), {"run": run, "arm": arm}
    if arm != "SFT":
        stage, options = arms[arm]
        started = time.monotonic()
        args = StepAgentConfig(
            output_dir=str(folder / f"run{run}" / "trainer"),
            save_strategy="no",
            disable_tqdm=True,
            **(demo.stage_options(stages.settings, stage) | options),
        )
        trainer = StepAgentTrainer(
            *(model, args, stages.trajectories, stages.tokenizer), env=stages.settings.environment
        )
        trainer.train()
        if on_trained is not None:
            on_trained(trainer)
        cycles = [entry for entry in trainer.state.log_history if "cycle" in entry]
        result |= {
            "seconds": time.monotonic() - started,
            "updates": trainer.state.global_step,
            "expert_answers": sum(entry.get("expert_answers", 0) for entry in cycles),
        }
        model = trainer.model
    episodes = stages.episodes(stages.policy(model), stages.settings.evaluation_seeds, arm)
    result["success"] = [int(episode.success) for episode in episodes]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    rate = 100 * np.mean(result["success"])
    print(f"run {run}, {arm}: {rate:.1f}", file=sys.stderr, flush=True)
    return result


def compare(cells: list[dict[str, Any]], arm: str, rival: str) -> RunsInterval | None:
    """``arm`` − ``rival`` in points of success, paired within runs."""
    values = {(c["run"], c["arm"]): 100 * np.array(c["success"]) for c in cells}
    runs = sorted({run for run, name in values if name == arm and (run, rival) in values})
    return bootstrap_runs([values[r, arm] - values[r, rival] for r in runs]) if runs else None


def table(
    cells: list[dict[str, Any]], names: Sequence[str] = tuple(ARMS), rivals: Sequence[str] = RIVALS
) -> str:
    """Success of each arm, and differences with intervals over runs."""
    lines = ["| arm | runs | success, % | per run | expert's answers | seconds |", "|---" * 6 + "|"]
    arms = [arm for arm in ("SFT", *names) if any(c["arm"] == arm for c in cells)]
    for arm in arms:
        own = [c for c in cells if c["arm"] == arm]
        rates = [100 * float(np.mean(c["success"])) for c in own]
        answers, seconds = (
            f"{np.median([c[name] for c in own]):.0f}" if name in own[0] else ""
            for name in ("expert_answers", "seconds")
        )
        per_run = ", ".join(f"{rate:.1f}" for rate in rates)
        lines.append(
            f"| {arm} | {len(own)} | {np.mean(rates):.1f} | {per_run} | {answers} | {seconds} |"
        )
    lines += ["", "| difference in points | mean | 95 % interval | worst run | per run |"]
    lines.append("|---" * 5 + "|")
    for arm in arms:
        for rival in rivals:
            found = compare(cells, arm, rival) if arm != rival else None
            if found is None or rival not in arms or arm in rivals[: rivals.index(rival)]:
                continue
            interval = "" if found.low is None else f"{found.low:+.1f} … {found.high:+.1f}"
            per_run = ", ".join(f"{difference:+.1f}" for difference in found.per_run)
            lines.append(
                f"| {arm} − {rival} | {found.mean:+.1f} | {interval} | {found.worst:+.1f} "
                f"| {per_run} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first-run", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=["SFT", *ARMS], default=["SFT", *ARMS][:4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/demo_runs"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = [
        run_cell(args.output, run, arm)
        for run in range(args.first_run, args.first_run + args.runs)
        for arm in args.arms
    ]
    print(table(cells))
    if args.json:
        about = environment() | {"capability": os.environ.get("ATEN_CPU_CAPABILITY", "native")}
        args.json.write_text(json.dumps({"environment": about, "cells": cells}) + "\n")
        args.json.with_suffix(".md").write_text(table(cells) + "\n")


if __name__ == "__main__":
    main()
