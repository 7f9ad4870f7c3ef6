r"""The claim that StepAgent outperforms its rivals: one model, one set of data, one budget.

    python benchmarks/claim/rivals.py --runs 10 --output runs/rivals        # resumes
    python benchmarks/claim/rivals.py --environments textworld:easy --arms "SFT continued" RFT
    stepagent report runs/rivals/"babyai_GoToLocalS6N2, 64"/run0/board/*    # curves, every episode
    torchrun --nproc_per_node 4 benchmarks/claim/rivals.py --model FOLDER \
        --engine http://localhost:8000      # a vLLM server of the model acts: docs/engines.md

A run has demonstrations, initial weights and an order of data of its own. Its arms go on from the
same SFT model with the same number of updates, and are measured on the same held-out episodes. The
unit is the run (`stepagent.evaluation.bootstrap_runs`). What differs between arms is in the table:
tokens that training encoded, environment steps (of rollouts, of continuations and their replays)
and answers that the expert was asked for, all counted after SFT. Every arm is compared with SFT,
with SFT continued, and with StepAgent's best form; all of these comparisons are printed.

BabyAI and TextWorld: each run trains on seeds of its own; 500,000 on are for choosing, and
1,000,000 on for the result. ScienceWorld: its own train, dev and test splits; runs share the train
split, so their demonstrations may overlap. ``--dev`` measures dev runs, which are others, on the
dev episodes. Choices are made so; docs/claim.md names those that were made after a test cell.

Predictions, written down before the first run:

1. implicit at the agent's states − SFT continued > 0 wherever SFT leaves failures: the expert
   answers where the agent went wrong. About 0 against DAgger, which learns from the same answers.
2. implicit at the expert's states − SFT continued about 0 (docs/convergence.md).
3. ETO − SFT continued > 0 but smaller than 1: an outcome does not say which step was wrong.
4. RFT − SFT continued about 0 with a deterministic expert: what succeeded is mostly what the
   demonstrations already show. More where success has many ways (TextWorld).
5. IPR between ETO and 1, at many more environment steps.
6. GRPO and GiGPO − SFT continued > 0 and small at so few episodes; GiGPO − GRPO about 0.
7. 1 shrinks as demonstrations become plentiful.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import environment
from counted import Spent, counted
from rivals_settings import (
    ABLATIONS,
    ARMS,
    LANGUAGE_MODEL,
    OF_OWN_EPISODES,
    RIVALS,
    TUNED,
    setting_of,
)

from stepagent.acting.policies import ExpertPolicy, ModelPolicy
from stepagent.acting.rollout import run_episodes
from stepagent.data.trajectory import load_trajectories, save_trajectories
from stepagent.evaluation import RunsInterval, bootstrap_runs
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.methods import method_class
from stepagent.learning.trainer import StepAgentTrainer
from stepagent.ranks import over_ranks, sum_over_ranks
from stepagent.tools.small_models import small_llama, word_tokenizer

DEV_RUNS = 40  # dev runs are numbered from here: no run of the result has their seeds
MEASURES = ("success", "reward")
T = TypeVar("T")
ALL = ARMS | ABLATIONS | TUNED
COSTS = ("updates", "tokens", "env_steps", "expert_answers", "seconds")


@dataclass(frozen=True)
class Cell:
    """One arm of one run."""

    environment: str
    demonstrations: int
    run: int
    arm: str
    dev: bool = False

    def file(self, output: Path) -> Path:
        """Where its result is kept."""
        return self.folder(output) / "cells" / f"{self.arm}{', dev' * self.dev}.json"

    def board(self, output: Path) -> Path:
        """What `stepagent report` shows of it: the measured episodes, and the training's log."""
        return self.folder(output) / "board" / f"{self.arm}{', dev' * self.dev}"

    def folder(self, output: Path) -> Path:
        """Of the run that it belongs to, which its arms share."""
        name = f"{self.environment.replace(':', '_')}, {self.demonstrations}"
        return output / name / f"run{self.run}"


class Run:
    """One run: its demonstrations, its SFT model, and what its arms make of it."""

    def __init__(
        self, cell: Cell, output: Path, model: Path | None, engine: str | None = None
    ) -> None:
        self.cell, self.folder, self._base = cell, cell.folder(output), model
        self._engine = engine
        self.setting = setting_of(cell.environment)
        if model is not None:
            self.setting = replace(self.setting, **LANGUAGE_MODEL)
        self.spent = Spent()
        self.folder.mkdir(parents=True, exist_ok=True)

    # -- data and models ---------------------------------------------------------------------------

    def env(self, part: int) -> Any:
        """What makes environments of the train, dev or test split (0, 1, 2)."""
        split, episodes = self.setting.splits[part], self.setting.episodes[part]
        return counted(self.cell.environment, split, episodes, self.spent)

    @cached_property
    def trajectories(self) -> list[Any]:
        """The expert's, of this run's own seeds."""
        path = self.folder / "expert.jsonl"
        if not together(path.exists):
            first = 10_000 * self.cell.run
            seeds = range(first, first + self.cell.demonstrations)
            episodes = self._episodes(ExpertPolicy(), 0, seeds, None)
            if PartialState().is_main_process:
                save_trajectories(path, [e.trajectory() for e in episodes if e.success])
            PartialState().wait_for_everyone()
        return load_trajectories(path)

    @cached_property
    def tokenizer(self) -> Any:
        if self._base is not None:
            return AutoTokenizer.from_pretrained(self._base)
        if self.setting.vocabulary is None:
            return word_tokenizer(self.trajectories)
        return bytes_tokenizer(self.trajectories, self.setting.vocabulary)

    def sft(self) -> Any:
        """Where all arms of a run begin."""
        folder = self.folder / "sft"
        if not together((folder / "done").exists):
            rate = {
                "learning_rate": self.setting.sft_learning_rate,
                "lr_scheduler_type": "constant_with_warmup",
                "num_train_epochs": self.setting.sft_epochs,
            }
            trainer = self._trainer(self._untrained(), {"method": "sft"} | rate)
            trainer.train()
            trainer.save_model(str(folder))
            PartialState().wait_for_everyone()
            (folder / "done").touch()
        if self._base is None:
            return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        from peft import PeftModel

        return PeftModel.from_pretrained(self._loaded(), folder, is_trainable=True)

    def _untrained(self) -> Any:
        torch.manual_seed(self.cell.run)
        if self._base is None:
            return small_llama(self.tokenizer, self.setting.hidden_size, self.setting.layers)
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self._loaded(), lora)

    def _loaded(self) -> Any:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return AutoModelForCausalLM.from_pretrained(self._base, use_safetensors=True, dtype=dtype)

    # -- training ----------------------------------------------------------------------------------

    def _trainer(self, model: Any, options: dict[str, Any]) -> StepAgentTrainer:
        s = self.setting
        shared: dict[str, Any] = {
            "output_dir": str(self.folder / "trainer"),
            "per_device_train_batch_size": max(1, s.batch_size // PartialState().num_processes),
            "seed": self.cell.run,
            "max_new_tokens": s.max_new_tokens,
            "max_tokens": s.max_tokens,
            "warmup_steps": 10,
            "include_num_input_tokens_seen": "all",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": self._base is not None and torch.cuda.is_available(),
        }
        fixed = options.pop("fixed_reference", False)
        args = StepAgentConfig(**(shared | options))
        acts = args.rolls_out or method_class(args.method, args.states).needs_env
        env = self.env(0) if acts else None
        reference = self.sft() if fixed or args.method == "ipr" else None
        return StepAgentTrainer(
            *(model, args, self.trajectories, self.tokenizer),
            ref_model=reference,
            env=env,
            engine=self._engine if args.has_cycles else None,
        )

    def options(self, arm: dict[str, Any]) -> dict[str, Any]:
        """Of an arm's training: as many updates as all others have, or about as many."""
        s = self.setting
        options = {"learning_rate": s.learning_rate, "lr_scheduler_type": "cosine"} | arm
        if arm["method"] == "sft":
            return options | {"num_train_epochs": s.cycles * s.epochs_per_cycle}
        options = {
            "cycles": s.cycles,
            "epochs_per_cycle": s.epochs_per_cycle,
            "max_steps_per_episode": s.steps[1],
        } | options
        if arm["method"] == "rft":
            options |= {"keep_reward": s.rft_keeps}
        if arm.get("states") == "agent" or arm["method"] in OF_OWN_EPISODES:
            size = int(arm.get("group_size", 1))
            options |= {  # as many items as demonstrations
                "rollouts": max(1, len(self.trajectories) // size) * size,
                "rollout_seed_start": 10_000 * self.cell.run + 1_000,
            }
        return options

    def train(self, arm: dict[str, Any]) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
        """An arm's model, what it cost, and what its training logged."""
        model = self.sft()
        if not arm:
            return model, dict.fromkeys(COSTS, 0), []
        trainer = self._trainer(model, self.options(arm))
        before, started = replace(self.spent), time.monotonic()
        trainer.train()
        costs = {
            "updates": _updates(trainer),
            "tokens": trainer.state.num_input_tokens_seen,
            "env_steps": int(sum_over_ranks(self.spent.env_steps - before.env_steps)),
            "expert_answers": int(
                sum_over_ranks(self.spent.expert_answers - before.expert_answers)
            ),
            "seconds": round(time.monotonic() - started, 1),
        }
        return trainer.model, costs, trainer.state.log_history

    # -- episodes ----------------------------------------------------------------------------------

    def measure(self, model: Any) -> list[Any]:
        """The dev or the test episodes; the policy is greedy."""
        part = 1 if self.cell.dev else 2
        first = self.setting.first_seeds[part - 1]
        seeds = range(first, first + self.setting.measured[part - 1])
        policy = ModelPolicy(
            model,
            self.tokenizer,
            max_new_tokens=self.setting.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return self._episodes(policy, part, seeds, self.setting.steps[0])

    def _episodes(self, policy: Any, part: int, seeds: range, limit: int | None) -> list[Any]:
        def some(places: list[int]) -> list[Any]:
            return run_episodes(
                *(self.env(part), policy, [seeds[i] for i in places]),
                max_steps=limit,
                batch_size=100 if self._base is None else 16,
                progress=None,
            )

        return over_ranks(some, np.ones(len(seeds)))


def bytes_tokenizer(trajectories: list[Any], size: int) -> Any:
    """Byte-pair encoding learnt from a run's own demonstrations: no word is unknown to it."""
    bytes_ = ByteLevel(add_prefix_space=False)
    like = word_tokenizer(trajectories)
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = bytes_, ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=like.all_special_tokens,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((m["content"] for t in trajectories for m in t.messages), trainer)
    names = {name: getattr(like, name) for name in ("pad_token", "unk_token", "eos_token")}
    extra = [token for token in like.all_special_tokens if token not in names.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=like.chat_template.replace("> ", ">").replace("}} ", "}}"),
        additional_special_tokens=extra,
        **names,
    )


def _updates(trainer: StepAgentTrainer) -> int:
    """Those that had something to learn: a cycle of few pairs has empty batches."""
    args, per_epoch = trainer.args, trainer.steps_per_epoch
    cycles = [entry for entry in trainer.state.log_history if "cycle" in entry]
    found = [entry.get("pairs", entry.get("trajectories")) for entry in cycles]
    if not cycles or None in found:
        return int(trainer.state.global_step)
    size = args.per_device_train_batch_size * args.world_size
    batches = [min(per_epoch, -(-items // size)) for items in found]
    return args.epochs_per_cycle * sum(batches)


def measured(cell: Cell, output: Path) -> dict[str, Any] | None:
    """A cell that was measured with the options that its arm has now."""
    path = cell.file(output)
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("options") == ALL[cell.arm] else None


def run_cell(
    cell: Cell, output: Path, model: Path | None, engine: str | None = None
) -> dict[str, Any]:
    """Train and measure one cell, unless it is measured."""
    if found := together(lambda: measured(cell, output)):
        return found
    path, options = cell.file(output), ALL[cell.arm]
    run = Run(cell, output, model, engine)
    trained, costs, log = run.train(options)
    episodes = run.measure(trained)
    values = {
        "success": [float(e.success) for e in episodes],
        "reward": [float(sum(e.rewards)) for e in episodes],
    }
    result = {**asdict(cell), "options": options, **costs, "values": values}
    if PartialState().is_main_process:
        board = cell.board(output)
        for folder in (board, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        save_trajectories(board / "episodes.jsonl", [e.trajectory() for e in episodes])
        (board / "log.json").write_text(json.dumps(log))
        path.write_text(json.dumps(result))
        means = {name: round(float(np.mean(v)), 3) for name, v in values.items()}
        print(*path.parts[-4:], means, costs, file=sys.stderr, flush=True)
    return result


def together(look: Callable[[], T]) -> T:
    """What all processes find, before one of them changes it."""
    found = look()
    PartialState().wait_for_everyone()
    return found


def compare(cells: list[dict[str, Any]], arm: str, rival: str, measure: str) -> RunsInterval | None:
    """``arm`` − ``rival`` in points, paired within runs; None where no run has both."""
    values = {(c["run"], c["arm"]): 100 * np.array(c["values"][measure]) for c in cells}
    runs = sorted(run for run, name in values if name == arm and (run, rival) in values)
    return bootstrap_runs([values[r, arm] - values[r, rival] for r in runs]) if runs else None


def table(cells: list[dict[str, Any]]) -> str:
    """Every arm, and every comparison, of each environment and number of demonstrations."""
    lines: list[str] = []
    for name, count in sorted({(c["environment"], c["demonstrations"]) for c in cells}):
        here = [c for c in cells if (c["environment"], c["demonstrations"]) == (name, count)]
        arms = [arm for arm in ALL if any(c["arm"] == arm for c in here)]
        lines += ["", f"**{name}, {count} demonstrations**", ""]
        lines += [*_arms(here, arms), "", *_differences(here, arms)]
    return "\n".join(lines).strip()


def _arms(cells: list[dict[str, Any]], arms: list[str]) -> list[str]:
    lines = [
        "| arm | runs | success, % | reward × 100 | updates | tokens trained on "
        "| environment steps | expert's answers | seconds |",
        "|---" * 9 + "|",
    ]
    for arm in arms:
        own = [c for c in cells if c["arm"] == arm]
        means = [100 * np.mean([np.mean(c["values"][m]) for c in own]) for m in MEASURES]
        costs = [np.mean([c[name] for c in own]) for name in COSTS]
        lines.append(
            f"| {arm} | {len(own)} | "
            + " | ".join([f"{mean:.1f}" for mean in means] + [f"{cost:,.0f}" for cost in costs])
            + " |"
        )
    return lines


def _differences(cells: list[dict[str, Any]], arms: list[str]) -> list[str]:
    lines = [
        "| difference in points | success | 95 % interval | per run | reward | 95 % interval |",
        "|---" * 6 + "|",
    ]
    for rival in RIVALS:
        for arm in arms:
            if arm == rival or (arm in RIVALS and RIVALS.index(arm) < RIVALS.index(rival)):
                continue
            success, reward = (compare(cells, arm, rival, m) for m in MEASURES)
            if success is None or reward is None:
                continue
            per_run = ", ".join(f"{difference:+.1f}" for difference in success.per_run)
            lines.append(
                f"| {arm} − {rival} | {success.mean:+.1f} | {_interval(success)} | {per_run} "
                f"| {reward.mean:+.1f} | {_interval(reward)} |"
            )
    return lines


def _interval(found: RunsInterval) -> str:
    return "" if found.low is None else f"{found.low:+.1f} … {found.high:+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--environments", nargs="+", default=["babyai:GoToLocalS6N2"])
    parser.add_argument("--demonstrations", nargs="+", type=int, default=[64])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--arms", nargs="+", choices=list(ALL), default=list(ARMS))
    parser.add_argument("--model", type=Path, help="folder of a language model, trained by LoRA")
    parser.add_argument("--engine", help="URL of a vLLM server of that model, which then acts")
    parser.add_argument("--dev", action="store_true", help="dev runs, on the dev episodes")
    parser.add_argument(
        "--measured", action="store_true", help="report what there is, train nothing"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--json", type=Path, help="write the result here, and a .md beside it")
    args = parser.parse_args()
    if set(args.arms) & set(TUNED) and not args.dev:
        parser.error("what is tuned is measured on dev runs alone: add --dev")
    if args.engine and not args.model:
        parser.error("--engine needs --model: what acts there is that model with an adapter")
    first = DEV_RUNS if args.dev else 0
    if args.runs > DEV_RUNS:
        parser.error(f"--runs must be at most {DEV_RUNS}, got {args.runs}: dev runs follow")
    wanted = [
        Cell(name, count, run, arm, args.dev)
        for name in args.environments
        for count in args.demonstrations
        for run in range(first, first + args.runs)
        for arm in args.arms
    ]
    if args.measured:
        wanted = [cell for cell in wanted if measured(cell, args.output)]
    PartialState(cpu=not torch.cuda.is_available())
    cells = [run_cell(cell, args.output, args.model, args.engine) for cell in wanted]
    if not PartialState().is_main_process:
        return
    print(table(cells))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "cells": cells}) + "\n")
        args.json.with_suffix(".md").write_text(table(cells) + "\n")


if __name__ == "__main__":
    main()
