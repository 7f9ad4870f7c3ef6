"""IPR's step rewards: what five continuations say, against two hundred.

    python benchmarks/claim/ipr_values.py --runs 3 --output runs/ipr_values    # resumes

An agent from scratch, SFT on 100 episodes of BabyAI's bot, stopped early. From each step of 12 of
its demonstrations it acts greedily to the end (IPR's exploration), and the SFT policy continues
after the agent's action there and after the expert's, at temperature 1: N = 5, and apart from
these N = 200.

1. Rank correlation of the two means, over all (state, action).
2. A step pair at N = 5 names a step, also one at which both do the same. Of an explored trajectory
   in which ground was lost: is the named one (of the largest gain in step reward) that where the
   N = 200 values part most? Chance is a step of it drawn evenly; and, apart, one of those at which
   the agent does otherwise than the expert, where there are several.
3. Does the agent's action at a named step lose ground, so that the bot needs more steps after it
   than after the expert's? Chance is all steps at which the agent does otherwise.

One training run is the unit of intervals (`bootstrap_runs`, trajectories within).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment

from stepagent.acting.exploring import explore, up_to
from stepagent.acting.policies import ExpertPolicy, ModelPolicy
from stepagent.acting.rollout import continue_rollouts, run_episodes
from stepagent.evaluation import RunsInterval, bootstrap_runs
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.preferences import Judged, ipr_preference
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.tools.small_models import small_llama, word_tokenizer

ENV = "babyai:GoToLocalS6N2"
DEMONSTRATIONS, EXPLORED = 100, 12
EPOCHS, MAX_NEW_TOKENS, MAX_STEPS = 12, 3, 15
FEW, MANY = 5, 200
OF_ALL = "named step is the lost one"
OF_DIFFERING = "of the steps that differ, the named one is the lost one"
GROUND = "ground lost at a named step"
NAMED = (OF_ALL, OF_DIFFERING, GROUND)


def measure(run: int, folder: Path) -> dict[str, Any]:
    """All (trajectory, step) after the first of one training run, with both sides' rewards."""
    first = 10_000 * run
    shown = run_episodes(ENV, ExpertPolicy(), range(first, first + DEMONSTRATIONS))
    demonstrations = [episode.trajectory() for episode in shown if episode.success]
    tokenizer = word_tokenizer(demonstrations)
    model = sft(demonstrations, tokenizer, run, folder)
    long = [one for one in demonstrations if one.num_steps > 2][:EXPLORED]

    def policy(temperature: float, seed: int = 0) -> ModelPolicy:
        options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": temperature}
        return ModelPolicy(model, tokenizer, seed=seed, **options)

    limits: dict[str, Any] = {"max_steps": MAX_STEPS, "batch_size": 400}
    episodes = explore(policy(0.0), ENV, long, **limits)
    rows = [
        {
            "trajectory": i,
            "step": t,
            "steps": one.num_steps,
            "differs": episodes[i][t].done[t] != one.messages[2 * t + 1]["content"],
            "agent_reward": float(sum(episodes[i][t].rewards)),
            "expert_reward": one.reward,
        }
        for i, one in enumerate(long)
        for t in range(1, one.num_steps)
    ]

    def fill(name: str, policy: Any, samples: int, rows: list[dict[str, Any]], most: int) -> None:
        """The mean of continuations after the agent's action, or the expert's."""
        places = [(row["trajectory"], row["step"]) for row in rows]
        agent = name.startswith("agent") or name == "bot_steps"
        found = continue_rollouts(
            policy,
            ENV,
            [up_to(episodes[i][t], t) if agent else long[i] for i, t in places],
            samples=samples,
            steps=[[t] for _, t in places],
            max_steps=most,
            batch_size=400,
        )
        for row, one in zip(rows, found, strict=True):
            value = len(one.episodes[0][0].actions) if name == "bot_steps" else one.values[0]
            row[name] = float(value)

    apart = [row for row in rows if row["differs"]]
    fill("agent_few", policy(1.0, 1), FEW, rows, MAX_STEPS)
    fill("expert_few", policy(1.0, 2), FEW, rows, MAX_STEPS)
    fill("agent_many", policy(1.0, 3), MANY, apart, MAX_STEPS)
    fill("expert_many", policy(1.0, 4), MANY, [r for r in rows if not last(r)], MAX_STEPS)
    fill("expert_many", policy(1.0, 4), 1, [row for row in rows if last(row)], MAX_STEPS)
    fill("bot_steps", ExpertPolicy(), 1, apart, 64)
    whole = [one[0].success for one in episodes]
    return {"run": run, "success": float(np.mean(whole)), "rows": rows}


def last(row: dict[str, Any]) -> bool:
    """After the expert's last action there is nothing to continue."""
    return bool(row["step"] == row["steps"] - 1)


def sft(demonstrations: Any, tokenizer: Any, run: int, folder: Path) -> Any:
    """The agent, which is the frozen policy too: IPR's first iteration."""
    torch.manual_seed(run)
    args = StepAgentConfig(
        method="sft",
        output_dir=str(folder / "trainer"),
        num_train_epochs=EPOCHS,
        learning_rate=2e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        per_device_train_batch_size=16,
        max_tokens=2048,
        seed=run,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = small_llama(tokenizer, hidden_size=64, layers=2)
    trainer = StepAgentTrainer(model, args, demonstrations, tokenizer)
    trainer.train()
    return trainer.model


def correlations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's, of the means of few continuations with those of many."""
    apart = [row for row in rows if row["differs"]]
    going = [row for row in rows if not last(row)]
    few = [r["expert_few"] for r in going] + [r["agent_few"] for r in apart]
    many = [r["expert_many"] for r in going] + [r["agent_many"] for r in apart]
    gaps = [[gap(row, name) for row in apart] for name in ("few", "many")]
    return {
        "values": spearman(few, many),
        "expert minus agent, where they differ": spearman(*gaps),
    }


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks, equal values sharing theirs."""
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def named(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each less what chance would give: see the head of this file."""
    apart = [row for row in rows if row["differs"]]
    lost = [row["bot_steps"] > row["steps"] for row in apart]
    found: dict[str, list[float]] = {name: [] for name in NAMED}
    for i in sorted({row["trajectory"] for row in rows}):
        steps = [row for row in rows if row["trajectory"] == i]
        pairs = [row for row in steps if side(row) == "expert"]
        if not pairs:
            continue
        found[OF_ALL] += _is_most(pairs, steps)
        differing = [row for row in steps if row["differs"]]
        found[OF_DIFFERING] += _is_most([r for r in pairs if r["differs"]], differing)
        found[GROUND] += [
            float(row["bot_steps"] > row["steps"]) - float(np.mean(lost))
            for row in pairs
            if row["differs"]
        ]
    return found


def _is_most(pairs: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[float]:
    """Whether the pair of the largest N = 5 gap is where N = 200 parts most, less the share of
    steps that are; nothing where there is no choice, or no step was lost."""
    most = max((gap(row, "many") for row in steps), default=0.0)
    lost = [row for row in steps if gap(row, "many") == most]
    if not pairs or most <= 0 or len(lost) == len(steps):
        return []
    best = max(pairs, key=lambda row: gap(row, "few"))
    return [float(gap(best, "many") == most) - len(lost) / len(steps)]


def gap(row: dict[str, Any], samples: str) -> float:
    """Expert's value less the agent's; the same action has one value, which few only estimate."""
    if samples == "many" and not row["differs"]:
        return 0.0
    return float(row[f"expert_{samples}"] - row[f"agent_{samples}"])


def side(row: dict[str, Any]) -> str | None:
    """Of IPR's step pair at the default thresholds."""
    left = row["steps"] - row["step"]
    agent = Judged(row["agent_reward"], row["agent_few"], left)
    expert = Judged(row["expert_reward"], row["expert_few"], left)
    return ipr_preference(row["step"], agent, expert)


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Over runs: correlations with their range, and the two shares above chance."""
    by_run = [correlations(cell["rows"]) for cell in cells]
    later = [[row for row in cell["rows"] if side(row)] for cell in cells]
    shares = [named(cell["rows"]) for cell in cells]
    found: dict[str, Any] = {
        "runs": len(cells),
        "step pairs": [len(rows) for rows in later],
        "of them where both do the same": [sum(not r["differs"] for r in rows) for rows in later],
        "success of the SFT policy": [cell["success"] for cell in cells],
        "rank correlation": {
            name: {"runs": [one[name] for one in by_run], **interval([[o[name]] for o in by_run])}
            for name in by_run[0]
        },
    }
    for name in NAMED:
        values = [share[name] for share in shares]
        found[f"{name}, above chance"] = {
            "counts": [len(one) for one in values],
            **interval([one for one in values if one]),
        }
    return found


def interval(values: list[list[float]]) -> dict[str, float | None]:
    if not values:
        return {}
    found: RunsInterval = bootstrap_runs(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def table(found: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        f"Made by `benchmarks/claim/ipr_values.py --runs {found['runs']}`.",
        "",
        "| | mean over runs | 95 % | runs, or counts of each |",
        "|---|---|---|---|",
    ]
    told = {f"rank correlation, {name}": one for name, one in found["rank correlation"].items()}
    told |= {name: one for name, one in found.items() if name.endswith("above chance")}
    for name, one in told.items():
        if "mean" not in one:
            continue
        span = "" if one["low"] is None else f"{one['low']:+.2f} … {one['high']:+.2f}"
        each = one.get("counts") or [round(value, 2) for value in one["runs"]]
        lines.append(f"| {name} | {one['mean']:+.2f} | {span} | {each} |")
    same = found["of them where both do the same"]
    lines.append(f"| step pairs at N = 5 | | | {found['step pairs']} |")
    lines.append(f"| of them where agent and expert do the same | | | {same} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/ipr_values"))
    arguments = parser.parse_args()
    cells = []
    for run in range(arguments.runs):
        path = arguments.output / f"run{run}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measure(run, arguments.output)))
        cells.append(json.loads(path.read_text()))
        print(json.dumps(summary(cells), indent=1), flush=True)
    results = Path(__file__).parents[1] / "results" / "ipr_values.json"
    told = {"environment": environment(), "settings": {"N": [FEW, MANY], "epochs": EPOCHS}}
    results.write_text(json.dumps(told | summary(cells), indent=1) + "\n")
    results.with_suffix(".md").write_text(table(summary(cells)))


if __name__ == "__main__":
    main()
