"""The demo over three seeds: does StepAgent beat its rivals, and by how much?

Each seed trains everything anew, on training levels of its own; all policies of a seed are
evaluated on the same held-out episodes. Reported are each seed's difference in success rate and
their mean, with a 95 % interval from a paired bootstrap over episodes within seeds.

    python benchmarks/demo_seeds.py            # resumes; about six times the demo's time
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stepagent.data.trajectory import load_trajectories
from stepagent.evaluation import stratified_bootstrap
from stepagent.tools.demo import METHODS, Settings, run_demo

sys.path.insert(0, str(Path(__file__).parent))
from common import environment

POLICIES = (
    *("random", "sft", "sft_continued", "dagger"),
    *("stepagent_expert_states", "stepagent", "inverse_expert_states", "inverse"),
)
# Each minus its rivals; at the expert's states, what the paper's form is worth.
PAIRS = [
    *((agent, rival) for agent in ("stepagent", "inverse") for rival in POLICIES[1:4]),
    ("inverse", "stepagent"),
    *(
        (agent, rival)
        for agent in ("stepagent_expert_states", "inverse_expert_states")
        for rival in ("sft", "sft_continued")
    ),
]


def successes(run: Path, policy: str) -> np.ndarray[Any, Any]:
    """Success of each held-out episode of a run, in the order of the seeds."""
    episodes = load_trajectories(run / policy / "episodes.jsonl")
    return np.array([float(episode.meta["success"]) for episode in episodes])


def run_both(run: Path, settings: Settings) -> dict[str, Any]:
    """The demo with either method in one folder; the metrics of all stages."""
    for method in METHODS:
        metrics = run_demo(run, settings, method)
    return metrics


def compare(runs: list[Path], policy: str, rival: str) -> dict[str, Any]:
    """``policy`` minus ``rival`` in percentage points, per seed and over seeds."""
    differences = [100 * (successes(run, policy) - successes(run, rival)) for run in runs]
    interval = stratified_bootstrap(differences)
    return {
        "per_seed": [float(d.mean()) for d in differences],
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| policy | success per seed, % | mean | expert's action at held-out states, % |",
        "|---|---|---|---|",
    ]
    for policy in POLICIES:
        rates = result["success"][policy]
        same = result["expert_agreement"].get(policy)
        lines.append(
            f"| {policy} | {_list(rates)} | {np.mean(rates):.1f} | {_list(same) if same else ''} |"
        )
    lines += ["", "| difference in points | per seed | mean | 95 % interval |", "|---|---|---|---|"]
    for name, d in result["differences"].items():
        interval = f"{d['low']:+.1f} … {d['high']:+.1f}"
        per_seed = _list(d["per_seed"], "+")
        lines.append(f"| {name} | {per_seed} | {d['mean']:+.1f} | {interval} |")
    lines.append(f"\nSeconds per seed: {_list(result['seconds'])}.")
    return "\n".join(lines)


def _list(values: list[float], sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo_seeds.json"))
    args = parser.parse_args()
    runs = [args.runs / f"seed{seed}" for seed in args.seeds]
    metrics = [
        run_both(run, Settings(seed=seed)) for run, seed in zip(runs, args.seeds, strict=True)
    ]
    result = {
        "environment": environment(),
        "success": {p: [100 * float(successes(run, p).mean()) for run in runs] for p in POLICIES},
        "expert_agreement": {
            p: [100 * m["expert_agreement"][p] for m in metrics] for p in POLICIES[1:]
        },
        "differences": {f"{a} − {b}": compare(runs, a, b) for a, b in PAIRS},
        "seconds": [m["seconds"] for m in metrics],
        "hyperparameters": metrics[0]["hyperparameters"],
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    args.json.with_suffix(".md").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
