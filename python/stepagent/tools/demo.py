"""The main job: from expert trajectories to a better agent, on a real environment, from scratch.

Collect the BabyAI bot's trajectories → tokenizer → supervised training of a small transformer →
StepAgent cycles, beside their fair rivals → evaluation on held-out episodes → report. Each stage
leaves its result in its own folder; a run that was interrupted continues where it stopped, and one
that is run again with the other method adds that method's stages.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

from ..acting.inspection import inspect
from ..acting.policies import ExpertPolicy, ModelPolicy, Policy, RandomPolicy
from ..acting.rollout import Episode, run_episodes
from ..data.encoding import encode
from ..data.trajectory import Trajectory, load_trajectories, save_trajectories
from ..data.trunk import Trunk
from ..evaluation import expert_agreement, paired_rate_interval, rate_interval, success_rate
from ..files import write_text
from ..learning.config import StepAgentConfig
from ..learning.options import Method
from ..learning.trainer import StepAgentTrainer
from ..models import score_trees
from ..ops import step_sums
from ..report.demo import ExampleStep, ExampleTrajectory, write_demo_report
from ..trees.tree import pack_step_pairs
from .small_models import small_llama, word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STAGES = {
    "sft": "SFT, until validation success stops rising",
    "sft_continued": "SFT continued, for as many updates as StepAgent",
    "stepagent_expert_states": "StepAgent at the expert's states (the paper's form)",
    "stepagent": "StepAgent at the agent's own states",
    "dagger": "DAgger: SFT on the expert's answers at the agent's states",
    "inverse_expert_states": "StepAgent, inverse RL at the expert's states (the paper's form)",
    "inverse": "StepAgent, inverse RL at the agent's own states",
}
# The last of a method's stages is the one that the others are compared with.
_METHOD_STAGES: dict[Method, tuple[str, ...]] = {
    "implicit": ("stepagent_expert_states", "dagger", "stepagent"),
    "inverse": ("inverse_expert_states", "inverse"),
}
METHODS = tuple(_METHOD_STAGES)
_MAIN_STAGES = {stages[-1] for stages in _METHOD_STAGES.values()}
_MAX_NEW_TOKENS = 3  # an action is one word and the end of the turn


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome. Chosen on the validation episodes alone."""

    seed: int = 0
    environment: str = "babyai:GoToLocalS6N2"
    demonstrations: int = 200
    hidden_size: int = 128
    layers: int = 2
    batch_size: int = 16
    sft_learning_rate: float = 1e-3
    sft_max_epochs: int = 60
    sft_patience: int = 6  # validations, 4 epochs apart, without a new best
    cycles: int = 4
    epochs_per_cycle: int = 4
    rollouts: int = 200
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    beta: float = 1.0
    sft_weight: float = 1.0
    max_steps: int = 20  # of an evaluation episode; the expert needs 8 at most
    rollout_max_steps: int = 10
    inverse_samples: int = 4  # at the expert's states, compared with each other
    gamma: float = 0.0
    first_validation_seed: int = 500_000
    validation_episodes: int = 200
    first_evaluation_seed: int = 1_000_000
    evaluation_episodes: int = 200

    @property
    def demonstration_seeds(self) -> range:
        """Each seed of the demo has 10,000 training levels of its own."""
        return range(10_000 * self.seed, 10_000 * self.seed + self.demonstrations)

    @property
    def first_rollout_seed(self) -> int:
        """The agent's own rollouts run on training levels behind the demonstrations'."""
        return 10_000 * self.seed + 1_000

    @property
    def validation_seeds(self) -> range:
        """For choosing: when to stop, and the settings themselves."""
        return range(
            self.first_validation_seed, self.first_validation_seed + self.validation_episodes
        )

    @property
    def evaluation_seeds(self) -> range:
        """For reporting, and nothing else."""
        return range(
            self.first_evaluation_seed, self.first_evaluation_seed + self.evaluation_episodes
        )


def stage_options(settings: Settings, stage: str) -> dict[str, Any]:
    """What a stage after SFT trains with, as options of `StepAgentConfig`; all update as often."""
    s = settings
    shared = {
        "per_device_train_batch_size": s.batch_size,
        "seed": s.seed,
        "max_tokens": 512,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": s.warmup_steps,
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
    }
    cycles = {"cycles": s.cycles, "epochs_per_cycle": s.epochs_per_cycle}
    at_agent = {
        "states": "agent",
        "rollouts": s.rollouts,
        "max_steps_per_episode": s.rollout_max_steps,
        "rollout_seed_start": s.first_rollout_seed,
    }
    implicit = {"method": "implicit", "beta": s.beta, "sft_weight": s.sft_weight, **cycles}
    inverse = {"method": "inverse", **cycles}
    several = {"samples": s.inverse_samples, "baseline": "leave_one_out"}
    by_stage: dict[str, dict[str, Any]] = {
        "sft_continued": {"method": "sft", "num_train_epochs": s.cycles * s.epochs_per_cycle},
        "stepagent_expert_states": implicit,
        "stepagent": implicit | at_agent,
        "dagger": {"method": "sft", **cycles, **at_agent},
        "inverse_expert_states": inverse | several,
        "inverse": inverse | at_agent | {"gamma": s.gamma},
    }
    return shared | by_stage[stage]


def run_demo(output: Path, settings: Settings, method: Method = "implicit") -> dict[str, Any]:
    """Run the demo into ``output``, or finish it there; returns what ``metrics.json`` holds.

    Args:
        method: of `METHODS`; stages of the other that ``output`` has are reported beside it.

    Raises:
        ValueError: when ``output`` holds a run with other settings.
    """
    demo = _Demo(output, settings, method)
    metrics = demo.run()
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_demo_report(output, metrics, demo.example())
    return metrics


class _Demo:
    """The stages, in order, each reading what the one before it left in the run's folder."""

    def __init__(self, folder: Path, settings: Settings, method: Method) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _check_same_run(folder / "settings.json", asdict(settings))
        self.folder, self.settings, self.method = folder, settings, method
        self.main = _METHOD_STAGES[method][-1]
        self._seconds = _Stopwatch(folder / "seconds.json")
        with self._seconds:
            self.trajectories = self._collect()
            self.tokenizer = self._tokenizer()
        self.trunks = [encode(t, self.tokenizer) for t in self.trajectories]

    def run(self) -> dict[str, Any]:
        """Train everything, evaluate everything."""
        with self._seconds:
            self._train_sft()
        for stage in ("sft_continued", *_METHOD_STAGES[self.method]):
            with self._seconds:
                self._train(stage)
        with self._seconds:
            return self._metrics()

    # -- data ------------------------------------------------------------------------------------

    def _collect(self) -> list[Trajectory]:
        path = self.folder / "expert.jsonl"
        if not path.exists():
            episodes = run_episodes(
                self.settings.environment,
                ExpertPolicy(),
                self.settings.demonstration_seeds,
                progress="expert",
            )
            save_trajectories(path, [e.trajectory() for e in episodes if e.success])
        return load_trajectories(path)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        folder = self.folder / "tokenizer"
        if not folder.exists():
            word_tokenizer(self.trajectories).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    # -- training --------------------------------------------------------------------------------

    def _train_sft(self) -> None:
        """Supervised training, until validation success stops rising; the best weights are kept."""
        best = self.folder / "sft" / "best"
        stop = _StopWhenFlat(self._validate, best, every=4, patience=self.settings.sft_patience)
        torch.manual_seed(self.settings.seed)
        self._run_stage(
            "sft",
            small_llama(self.tokenizer, self.settings.hidden_size, self.settings.layers),
            stop,
            stage_options(self.settings, "sft_continued")
            | {
                "num_train_epochs": self.settings.sft_max_epochs,
                "learning_rate": self.settings.sft_learning_rate,
                "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": 20,
            },
        )
        if best.exists():
            shutil.copy(best / "model.safetensors", self.folder / "sft" / "model.safetensors")
            shutil.rmtree(best)

    def _train(self, name: str) -> None:
        """One way to continue from the supervised model, with the same number of updates."""
        self._run_stage(
            name,
            self.model("sft"),
            _ScoreCycles(self._evaluate) if name == self.main else None,
            stage_options(self.settings, name),
        )

    def _run_stage(
        self,
        name: str,
        model: PreTrainedModel,
        callback: TrainerCallback | None,
        options: dict[str, Any],
    ) -> None:
        folder = self.folder / name
        if (folder / "log.json").exists():
            return
        tqdm.write(f"\n{_STAGES[name]}", file=sys.stderr)
        checkpoints = folder / "checkpoints"
        args = StepAgentConfig(
            output_dir=str(checkpoints), save_strategy="epoch", save_total_limit=1, **options
        )
        trainer = StepAgentTrainer(
            model,
            args,
            self.trajectories,
            self.tokenizer,
            env=self.settings.environment,
            callbacks=[callback] if callback else None,
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
        trainer.save_model(str(folder))
        shutil.rmtree(checkpoints)
        write_text(folder / "log.json", json.dumps(trainer.state.log_history, indent=2))

    def model(self, name: str) -> PreTrainedModel:
        """The model that a stage left."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name, use_safetensors=True)

    # -- evaluation ------------------------------------------------------------------------------

    def _policy(self, model: PreTrainedModel) -> ModelPolicy:
        return ModelPolicy(model, self.tokenizer, max_new_tokens=_MAX_NEW_TOKENS)

    def _episodes(self, policy: Policy, seeds: Sequence[int], label: str) -> list[Episode]:
        return run_episodes(
            self.settings.environment,
            policy,
            seeds,
            max_steps=self.settings.max_steps,
            batch_size=100,
            progress=label,
        )

    def _validate(self, model: PreTrainedModel) -> float:
        return success_rate(
            self._episodes(self._policy(model), self.settings.validation_seeds, "validate")
        )

    def _evaluate(self, model: PreTrainedModel) -> float:
        return success_rate(
            self._episodes(self._policy(model), self.settings.evaluation_seeds, "evaluate")
        )

    def _successes(self, name: str) -> list[int]:
        """Success of each held-out episode, kept as trajectories beside the model."""
        path = self.folder / name / "episodes.jsonl"
        if not path.exists():
            policy = RandomPolicy() if name == "random" else self._policy(self.model(name))
            episodes = self._episodes(policy, self.settings.evaluation_seeds, name)
            if name in _MAIN_STAGES:
                self._add_step_rewards(name, episodes)
            path.parent.mkdir(exist_ok=True)
            save_trajectories(path, [episode.trajectory() for episode in episodes])
        return [int(t.meta["success"]) for t in load_trajectories(path)]

    @torch.no_grad()
    def _add_step_rewards(self, name: str, episodes: Sequence[Episode]) -> None:
        """β (log π − log π_sft) of each action that the agent took."""
        agent, sft = self.model(name), self.model("sft")
        for episode in episodes:
            if episode.trunk is None:  # it crashed
                continue
            (tree,) = pack_step_pairs([episode.trunk], [[[] for _ in episode.actions]])
            difference_N = score_trees(agent, [tree]) - score_trees(sft, [tree])
            rewards_S = self.settings.beta * step_sums(difference_N, tree.step_offsets)
            episode.step_rewards = rewards_S.tolist()

    def _cycles(self, name: str) -> list[dict[str, Any]]:
        """What each cycle logged; numbered from 1, for the agent before any cycle is SFT's."""
        log = json.loads((self.folder / name / "log.json").read_text())
        return [
            {**entry, "cycle": entry["cycle"] + 1, "loss": entry["mean_loss"]}
            for entry in log
            if "cycle" in entry
        ]

    def _metrics(self) -> dict[str, Any]:
        s, main = self.settings, self.main
        trained = [name for name in _STAGES if (self.folder / name / "log.json").exists()]
        names = ["random", *trained]
        successes = {name: self._successes(name) for name in names}
        results: dict[str, Any] = {name: _result(values) for name, values in successes.items()}
        for name in trained:
            if name in _MAIN_STAGES:
                results[name] |= {"states": "agent", "cycles": self._cycles(name)}
        held_out = self._held_out_trunks()
        cycles = results[main]["cycles"]
        return {
            "environment": s.environment,
            "seed": s.seed,
            "method": self.method,
            "main": main,
            **results,
            "differences": {
                name: asdict(paired_rate_interval(successes[main], successes[name]))
                for name in names
                if name != main
            },
            "expert_agreement": {
                name: expert_agreement(
                    self.model(name),
                    held_out,
                    max_new_tokens=_MAX_NEW_TOKENS,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
                for name in trained
            },
            "tokens": {
                "unique": sum(cycle["tokens_unique"] for cycle in cycles),
                "naive": sum(cycle["tokens_naive"] for cycle in cycles),
            },
            "episodes": s.evaluation_episodes,
            "validation_seeds": [s.validation_seeds[0], s.validation_seeds[-1]],
            "evaluation_seeds": [s.evaluation_seeds[0], s.evaluation_seeds[-1]],
            "hyperparameters": asdict(s),
            "seconds": self._seconds.total(),
        }

    def _held_out_trunks(self) -> list[Trunk]:
        """The expert on the evaluation episodes."""
        path = self.folder / "expert_held_out.jsonl"
        if not path.exists():
            policy, seeds = ExpertPolicy(), self.settings.evaluation_seeds
            episodes = self._episodes(policy, seeds, "expert, held out")
            save_trajectories(path, [e.trajectory() for e in episodes])
        return [encode(t, self.tokenizer) for t in load_trajectories(path)]

    # -- one trajectory, to look at --------------------------------------------------------------

    def example(self) -> ExampleTrajectory:
        """A held-out episode that StepAgent solved and SFT did not, at the expert's states."""
        before, after = self._successes("sft"), self._successes(self.main)
        gained = [i for i, (b, a) in enumerate(zip(before, after, strict=True)) if a > b]
        trajectories = load_trajectories(self.folder / "expert_held_out.jsonl")
        # The longest of them has the most to show.
        index = max(gained or range(len(trajectories)), key=lambda i: trajectories[i].num_steps)
        return self._step_rewards(trajectories[index])

    @torch.no_grad()
    def _step_rewards(self, trajectory: Trajectory) -> ExampleTrajectory:
        sft, agent = self.model("sft"), self.model(self.main)
        trunk = encode(trajectory, self.tokenizer)
        (before,), (after,) = (
            inspect(
                model,
                [trunk],
                max_new_tokens=_MAX_NEW_TOKENS,
                temperature=0.0,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            for model in (sft, agent)
        )
        (tree,) = pack_step_pairs([trunk], [before])
        difference_N = score_trees(agent, [tree]) - score_trees(sft, [tree])
        rewards = self.settings.beta * step_sums(difference_N, tree.step_offsets)
        contents = [message["content"] for message in trajectory.messages]
        steps = tuple(
            ExampleStep(
                observation=contents[2 * t],
                expert_action=contents[2 * t + 1],
                before=self._text(before[t][0].token_ids),
                after=self._text(after[t][0].token_ids),
                reward=float(rewards[2 * t]),
                reward_before=float(rewards[2 * t + 1]),
            )
            for t in range(trajectory.num_steps)
        )
        return ExampleTrajectory(title=str(trajectory.id), steps=steps)

    def _text(self, token_ids: np.ndarray[Any, Any]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.exists() else None  # type: ignore[no-untyped-call]


class _StopWhenFlat(TrainerCallback):
    """Validate every few epochs, keep the best weights, stop when they stay the best."""

    def __init__(
        self, validate: Callable[[Any], float], best: Path, *, every: int, patience: int
    ) -> None:
        self._validate, self._best = validate, best
        self._every, self._patience = every, patience

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if round(state.epoch) % self._every:
            return
        # The scores so far are in the trainer's state, which a checkpoint restores.
        scores = [entry["validation"] for entry in state.log_history if "validation" in entry]
        score = self._validate(model)
        state.log_history.append({"epoch": state.epoch, "validation": score})
        if score > max(scores, default=-1.0):
            model.save_pretrained(self._best)
        elif len(scores) - int(np.argmax(scores)) >= self._patience:
            control.should_training_stop = True


class _ScoreCycles(TrainerCallback):
    """Adds the success rate on the held-out episodes to each cycle's log entry."""

    def __init__(self, evaluate: Callable[[Any], float]) -> None:
        self._evaluate = evaluate

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        latest = state.log_history[-1] if state.log_history else {}
        if "cycle" in latest and "success_rate" not in latest:
            latest["success_rate"] = self._evaluate(model)


class _Stopwatch:
    """Seconds of work, added up over interruptions."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        write_text(self._path, json.dumps(self.total()))
        self._start = time.monotonic()

    def total(self) -> float:
        """Seconds up to now."""
        earlier = json.loads(self._path.read_text()) if self._path.exists() else 0.0
        return float(earlier + time.monotonic() - self._start)


def _check_same_run(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2))
        return
    found = json.loads(path.read_text())
    if found != settings:
        changed = [name for name in settings if settings[name] != found.get(name)]
        raise ValueError(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}); "
            "choose another output folder or delete it"
        )


def _result(successes: Sequence[int]) -> dict[str, Any]:
    interval = rate_interval(successes)
    return {"success_rate": interval.mean, "interval": [interval.low, interval.high]}
