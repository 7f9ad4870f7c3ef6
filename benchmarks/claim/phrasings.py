"""E1: what training against the agent's own samples gives at the expert's states.

    python benchmarks/claim/phrasings.py --runs 5 --output runs/phrasings    # resumes

An expert that thinks before it acts, in K ways: BabyAI's bot, whose action is wrapped in
"Thought: … Action: …" with one of K phrasings at random. A small transformer from scratch learns
from 100 episodes, stops after some epochs of SFT, and goes on in six ways with equal updates.

Predictions, written down before the first run (docs/convergence.md has the laws):

1. implicit − SFT > 0 where SFT was cut short (10 epochs), about 0 where it was long (40).
2. implicit − SFT continued about 0 everywhere.
3. inverse − SFT continued > 0 in valid actions and in success at temperature 1 for K = 8,
   about 0 for K = 1.

Added after the first four cells of run 0, before any of theirs:

4. SRL − SFT continued > 0 in agreement and success for K = 8: it rewards the action alone.
5. early experience − SFT continued > 0 in success: what the agent's own actions lead to is the
   only thing here that is not in the demonstrations.

One training run is the unit: each has its own demonstrations, seed of weights and order of data;
its arms go on from the same SFT model and are measured on the same 100 held-out episodes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import environment
from thinking_babyai import action_of

from stepagent import encode, inspect
from stepagent.acting.policies import ExpertPolicy, ModelPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.trajectory import Trajectory
from stepagent.evaluation import RunsInterval, bootstrap_runs
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.methods import register_method
from stepagent.learning.methods.srl import SRL
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.tools.small_models import small_llama, word_tokenizer

MAX_NEW_TOKENS = 32
EPOCHS = 24  # of every arm after SFT: 6 cycles of 4
ARMS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "SFT continued": {"method": "sft", "num_train_epochs": EPOCHS},
    "implicit": {"method": "implicit", "beta": 1.0, "sft_weight": 0.0, "samples": 4},
    "inverse": {"method": "inverse", "samples": 4, "baseline": "leave_one_out"},
    "inverse, difference": {
        **{"method": "inverse", "samples": 4, "baseline": "leave_one_out"},
        "reward_form": "difference",
    },
    "SRL": {"method": "srl_of_phrasings", "samples": 4},
    "early experience": {"method": "early_experience", "samples": 4},
}
MEASURES = ("success, greedy", "success, T = 1", "valid, T = 1", "agreement")


@register_method("srl_of_phrasings")
class SRLOfPhrasings(SRL):
    """SRL whose actions are read as this environment reads them: its words have no line breaks."""

    def _action(self, ids: Any) -> str | None:
        return action_of(self._tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class Cell:
    """One run of one arm."""

    run: int
    phrasings: int
    sft_epochs: int
    arm: str

    @property
    def name(self) -> str:
        return f"run {self.run}, K = {self.phrasings}, {self.sft_epochs} epochs, {self.arm}"

    def path(self, folder: Path) -> Path:
        """Where its result is, once it was measured."""
        return folder / "cells" / f"{self.name}.json"


class Experiment:
    """The data and the models of one run with one K."""

    def __init__(self, folder: Path, run: int, phrasings: int) -> None:
        self.run, self.folder = run, folder / f"run{run}_k{phrasings}"
        self.env = f"phrasings:{phrasings}"
        first = 10_000 * run
        self.trajectories = self._expert(range(first, first + 100))
        held_out = self._expert(range(900_000, 900_100))
        self.tokenizer = word_tokenizer([*self.trajectories, *held_out])
        self.held_out = [encode(trajectory, self.tokenizer) for trajectory in held_out]

    def _expert(self, seeds: range) -> list[Trajectory]:
        episodes = run_episodes(self.env, ExpertPolicy(), seeds, progress=None)
        return [episode.trajectory() for episode in episodes if episode.success]

    def train(self, model: Any, options: dict[str, Any]) -> Any:
        shared: dict[str, Any] = {
            "output_dir": str(self.folder / "trainer"),
            "per_device_train_batch_size": 16,
            "seed": self.run,
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_tokens": 2048,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "save_strategy": "no",
            "report_to": [],
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = StepAgentConfig(**shared | options)
        env = self.env if args.method == "early_experience" else None
        trainer = StepAgentTrainer(model, args, self.trajectories, self.tokenizer, env=env)
        trainer.train()
        return trainer.model

    def sft(self, epochs: int) -> Any:
        """Where all arms of a run begin; a constant rate, so that fewer epochs are a prefix."""
        folder = self.folder / f"sft{epochs}"
        if not (folder / "config.json").exists():
            self._from_scratch(epochs).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)

    def _from_scratch(self, epochs: int) -> Any:
        torch.manual_seed(self.run)
        model = small_llama(self.tokenizer, hidden_size=64, layers=2)
        constant = {"learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup"}
        return self.train(model, {"method": "sft", "num_train_epochs": epochs} | constant)

    def arm(self, model: Any, name: str) -> Any:
        if not ARMS[name]:
            return model
        cycles = {"cycles": 6, "epochs_per_cycle": 4} if ARMS[name]["method"] != "sft" else {}
        return self.train(model, {"learning_rate": 5e-4} | cycles | ARMS[name])

    def measure(self, model: Any) -> dict[str, list[float]]:
        """Each measure's values over the held-out episodes, or states."""
        greedy, sampled = (self._episodes(model, temperature) for temperature in (0.0, 1.0))
        return {
            "success, greedy": [float(e.success) for e in greedy],
            "success, T = 1": [float(e.success) for e in sampled],
            "valid, T = 1": [float(np.mean([bool(v) for v in e.valid])) for e in sampled],
            "agreement": self._agreement(model),
        }

    def _episodes(self, model: Any, temperature: float) -> list[Any]:
        policy = ModelPolicy(
            model, self.tokenizer, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature
        )
        seeds = range(1_000_000, 1_000_100)
        return run_episodes(self.env, policy, seeds, max_steps=15, batch_size=100, progress=None)

    def _agreement(self, model: Any) -> list[float]:
        """Per held-out trajectory, the share of steps with the expert's parsed action; greedy."""
        end = self.tokenizer.eos_token_id
        tried = inspect(
            *(model, self.held_out),
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0.0,
            eos_token_id=end,
        )
        return [
            float(
                np.mean(
                    [
                        self._action(trunk.input_ids[start:stop]) == self._action(step[0].token_ids)
                        for (start, stop), step in zip(trunk.action_spans, steps, strict=True)
                    ]
                )
            )
            for trunk, steps in zip(self.held_out, tried, strict=True)
        ]

    def _action(self, ids: Any) -> str | None:
        return action_of(self.tokenizer.decode(ids, skip_special_tokens=True))


def run_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """Train and measure one cell, or read it where it was measured."""
    path = cell.path(folder)
    if path.exists():
        return json.loads(path.read_text())
    experiment = Experiment(folder, cell.run, cell.phrasings)
    model = experiment.arm(experiment.sft(cell.sft_epochs), cell.arm)
    result = {**asdict(cell), "values": experiment.measure(model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    means = {name: round(float(np.mean(v)), 3) for name, v in result["values"].items()}
    print(cell.name, means, file=sys.stderr, flush=True)
    return result


def compare(cells: list[dict[str, Any]], arm: str, rival: str, measure: str) -> RunsInterval:
    """``arm`` − ``rival`` in points, paired within runs."""
    values = {(c["run"], c["arm"]): np.array(c["values"][measure]) for c in cells}
    runs = sorted({run for run, name in values if name == arm})
    return bootstrap_runs([100 * (values[r, arm] - values[r, rival]) for r in runs])


def table(cells: list[dict[str, Any]]) -> str:
    """Means, and differences with intervals over runs, per setting."""
    lines = []
    for phrasings, epochs in sorted({(c["phrasings"], c["sft_epochs"]) for c in cells}):
        here = [c for c in cells if (c["phrasings"], c["sft_epochs"]) == (phrasings, epochs)]
        lines += [f"\n**K = {phrasings}, SFT of {epochs} epochs**\n"]
        lines += [f"| arm | runs | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 2) + "|"]
        arms = [arm for arm in ARMS if any(c["arm"] == arm for c in here)]
        runs = {arm: sum(c["arm"] == arm for c in here) for arm in arms}
        for arm in arms:
            means = [
                np.mean([np.mean(c["values"][m]) for c in here if c["arm"] == arm])
                for m in MEASURES
            ]
            shown = " | ".join(f"{100 * mean:.1f}" for mean in means)
            lines.append(f"| {arm} | {runs[arm]} | {shown} |")
        for arm in arms[1:]:
            for rival in ("SFT", "SFT continued")[: 1 + (arm != "SFT continued")]:
                found = [_difference(compare(here, arm, rival, m)) for m in MEASURES]
                lines.append(f"| {arm} − {rival} | {runs[arm]} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _difference(interval: RunsInterval) -> str:
    if interval.low is None:
        return f"{interval.mean:+.1f}"
    return f"{interval.mean:+.1f} ({interval.low:+.1f} … {interval.high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["8:10", "8:40", "1:40"],
        help="K:E, the expert's phrasings and the epochs of SFT",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--measured", action="store_true", help="only the cells that are there")
    parser.add_argument("--output", type=Path, default=Path("runs/phrasings"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    settings = [tuple(map(int, setting.split(":"))) for setting in args.settings]
    wanted = [
        Cell(run, phrasings, epochs, arm)
        for run in range(args.runs)
        for phrasings, epochs in settings
        for arm in args.arms
    ]
    if args.measured:
        wanted = [cell for cell in wanted if cell.path(args.output).exists()]
    cells = [run_cell(args.output, cell) for cell in wanted]
    print(table(cells))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "cells": cells}) + "\n")
        args.json.with_suffix(".md").write_text(table(cells).strip() + "\n")


if __name__ == "__main__":
    main()
