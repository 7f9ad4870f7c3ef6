"""The agents of a run: each is trained from what the one before it left in the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ...acting.policies import ExpertPolicy, ModelPolicy, Policy
from ...acting.rollout import Episode, run_episodes
from ...data.trajectory import Trajectory, load_trajectories, save_trajectories
from ...evaluation import success_rate
from ...learning.config import StepAgentConfig
from ...learning.trainer import StepAgentTrainer
from ..small_models import small_llama, word_tokenizer
from .callbacks import ScoreCycles, StopWhenFlat
from .folder import Stopwatch, check_same_run
from .settings import Settings
from .stages import METHOD_STAGES, TITLES, Method, stage_options
from .training import train_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 3  # an action is one word and the end of the turn


class Demo:
    """A run in its folder: the expert's trajectories, the tokenizer, and the stages' models.

    Attributes:
        main: the stage of the method that the others are compared with.
        trajectories: the expert's, that all stages learn from.
    """

    def __init__(self, folder: Path, settings: Settings, method: Method) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        check_same_run(folder / "settings.json", asdict(settings))
        self.folder, self.settings, self.method = folder, settings, method
        self.main = METHOD_STAGES[method][-1]
        self.seconds = Stopwatch(folder / "seconds.json")
        with self.seconds:
            self.trajectories = self._collect()
            self.tokenizer = self._tokenizer()

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

    def train_all(self) -> None:
        """The supervised model, then each way to continue from it."""
        with self.seconds:
            self.train_sft()
        for stage in ("sft_continued", *METHOD_STAGES[self.method]):
            with self.seconds:
                self._train(stage)

    def train_sft(self) -> None:
        """Supervised training, until validation success stops rising; the best weights are kept."""
        s = self.settings
        best = self.folder / "sft" / "best"
        stop = StopWhenFlat(self._validate, best, every=4, patience=s.sft_patience)

        def untrained() -> PreTrainedModel:
            torch.manual_seed(s.seed)
            return small_llama(self.tokenizer, s.hidden_size, s.layers)

        self._run_stage(
            "sft",
            untrained,
            stop,
            stage_options(s, "sft_continued")
            | {
                "num_train_epochs": s.sft_max_epochs,
                "learning_rate": s.sft_learning_rate,
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
            lambda: self.model("sft"),
            ScoreCycles(self._evaluate) if name == self.main else None,
            stage_options(self.settings, name),
        )

    def _run_stage(
        self,
        name: str,
        model: Callable[[], PreTrainedModel],
        callback: TrainerCallback | None,
        options: dict[str, Any],
    ) -> None:
        def make_trainer(args: StepAgentConfig) -> StepAgentTrainer:
            return StepAgentTrainer(
                model(),
                args,
                self.trajectories,
                self.tokenizer,
                env=self.settings.environment,
                callbacks=[callback] if callback else None,
            )

        train_stage(self.folder / name, TITLES[name], options, make_trainer)

    # -- what a stage left, and what it does -----------------------------------------------------

    def model(self, name: str) -> PreTrainedModel:
        """The model that a stage left."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name, use_safetensors=True)

    def policy(self, model: PreTrainedModel) -> ModelPolicy:
        """A model that acts greedily."""
        return ModelPolicy(model, self.tokenizer, max_new_tokens=MAX_NEW_TOKENS)

    def episodes(self, policy: Policy, seeds: Sequence[int], label: str) -> list[Episode]:
        """One episode a seed, of at most ``max_steps``; the label is its progress bar's."""
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
            self.episodes(self.policy(model), self.settings.validation_seeds, "validate")
        )

    def _evaluate(self, model: PreTrainedModel) -> float:
        return success_rate(
            self.episodes(self.policy(model), self.settings.evaluation_seeds, "evaluate")
        )
