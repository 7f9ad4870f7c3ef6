"""IPR's step rewards: what five continuations say, against two hundred.

    python benchmarks/claim/ipr_values.py --runs 5 --output runs/ipr_values    # resumes

An agent from scratch, SFT on 100 episodes of BabyAI's bot, stopped early. From each step of 12 of
its demonstrations it acts greedily to the end (IPR's exploration), and the SFT policy continues
after the agent's action there and after the expert's, at temperature 1: N = 5, and apart from
these N = 200.

1. Rank correlation of the two means, over all (state, action).
2. A step pair at N = 5 names a step. Of an explored trajectory with several steps at which the
   agent does otherwise than the expert: is the named one (of the largest gain in step reward) that
   where the N = 200 values part most? Chance is one of those steps, drawn evenly.
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

from stepagent.acting.exploring import explore
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


def measure(run: int, folder: Path) -> dict[str, Any]:
    """All (trajectory, step) of one training run, with both sides' rewards."""
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
    flat = [(i, t) for i, one in enumerate(long) for t in range(one.num_steps)]
    explored = [episodes[i][t].trajectory() for i, t in flat]
    steps = [[t] for _, t in flat]

    def values(trajectories: Any, steps: Any, samples: int, seed: int) -> list[float]:
        found = continue_rollouts(
            policy(1.0, seed), ENV, trajectories, samples=samples, steps=steps, **limits
        )
        return [float(value) for one in found for value in one.values]

    whole = [list(range(one.num_steps)) for one in long]
    bot = continue_rollouts(ExpertPolicy(), ENV, explored, samples=1, steps=steps, max_steps=64)
    table = {
        "agent_few": values(explored, steps, FEW, 1),
        "expert_few": values(long, whole, FEW, 2),
        "agent_many": values(explored, steps, MANY, 3),
        "expert_many": values(long, whole, MANY, 4),
        "bot_steps": [len(one.episodes[0][0].actions) for one in bot],
    }
    rows = []
    for place, (i, t) in enumerate(flat):
        episode, demonstration = episodes[i][t], long[i]
        own = demonstration.messages[2 * t + 1]["content"]
        rows.append(
            {
                "trajectory": i,
                "step": t,
                "steps": demonstration.num_steps,
                "differs": episode.done[t] != own,
                "agent_reward": float(sum(episode.rewards)),
                "expert_reward": demonstration.reward,
                **{name: column[place] for name, column in table.items()},
            }
        )
    return {"run": run, "success": float(np.mean([e[0].success for e in episodes])), "rows": rows}


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
    few = [row[f"{side}_few"] for row in rows for side in ("agent", "expert")]
    many = [row[f"{side}_many"] for row in rows for side in ("agent", "expert")]
    apart = [row for row in rows if row["differs"] and row["step"] > 0]
    gaps = [[row[f"expert_{n}"] - row[f"agent_{n}"] for row in apart] for n in ("few", "many")]
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


def named(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Per trajectory: whether the named step is where values part most, less chance; per named
    step: whether the agent lost ground there, less the share of all steps where they differ."""
    hits, ground = [], []
    apart = [row for row in rows if row["differs"] and row["step"] > 0]
    lost = [row["bot_steps"] > row["steps"] for row in apart]
    for i in sorted({row["trajectory"] for row in apart}):
        steps = [row for row in apart if row["trajectory"] == i]
        pairs = [row for row in steps if side(row) == "expert"]
        ground += [float(row["bot_steps"] > row["steps"]) - float(np.mean(lost)) for row in pairs]
        if len(steps) < 2 or not pairs:
            continue
        best = max(pairs, key=lambda row: gap(row, "few"))
        most = max(gap(row, "many") for row in steps)
        hits.append(float(gap(best, "many") == most) - 1 / len(steps))
    return hits, ground


def gap(row: dict[str, Any], samples: str) -> float:
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
    later = [[row for row in cell["rows"] if row["step"] and side(row)] for cell in cells]
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
    for place, name in enumerate(("named step is the lost one", "ground lost at a named step")):
        values = [share[place] for share in shares]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
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


if __name__ == "__main__":
    main()
