"""The agents of a run: a language model, and the adapters that its stages leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ....acting.policies import ExpertPolicy, ModelPolicy, Policy
from ....acting.rollout import run_episodes
from ....data.encoding import encode
from ....data.ends import ends_of
from ....data.trajectory import Trajectory
from ....envs import make
from ....files import cache_folder
from ....learning.config import StepAgentConfig
from ....learning.trainer import StepAgentTrainer
from ....records.episode_file import open_episodes
from ....records.episodes import Episode
from ...smollm2 import smollm2_folder
from ..folder import Stopwatch, check_same_run
from ..training import train_stage
from .costs import UpdateCosts
from .settings import Settings
from .stages import ARMS, TITLES, UNTRAINED, stage_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 16  # episodes side by side: a run that is stopped loses those of one batch


class LanguageModelDemo:
    """A run in its folder: the expert's trajectories, and the adapter of each stage.

    Attributes:
        trajectories: the expert's, that all stages learn from.
        instructions: the environment's, which the untrained model is told.
        ends: ids of the tokens that end an action.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Raises ImportError and ValueError for all that the run would need and not find."""
        with closing(make(settings.environment)) as env:
            self.instructions: str | None = getattr(env, "instructions", None)
        self._base = _base_folder(settings.model)
        self.tokenizer: PreTrainedTokenizerBase = _tokenizer(self._base)
        folder.mkdir(parents=True, exist_ok=True)
        check_same_run(folder / "settings.json", asdict(settings))
        self.folder, self.settings = folder, settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds = Stopwatch(folder / "seconds.json")
        with self.seconds:
            games = self.expert("expert.jsonl", settings.demonstration_seeds)
        self.trajectories = [game for game in games if game.meta["success"]]
        if not self.trajectories:
            raise ValueError(
                f"the expert must succeed in a game of {settings.environment}, "
                f"got none of {len(games)}"
            )
        self.ends = ends_of(encode(t, self.tokenizer) for t in self.trajectories)

    # -- episodes --------------------------------------------------------------------------------

    def expert(self, file: str, seeds: Sequence[int]) -> list[Trajectory]:
        """The expert's episodes, kept in ``file``, as trajectories."""
        episodes = self._episodes(self.folder / file, ExpertPolicy, "expert", seeds, None)
        return [episode.trajectory() for episode in episodes]

    def episodes(self, stage: str) -> list[Episode]:
        """A stage's held-out episodes, kept beside its adapter."""
        path = self.folder / stage / "episodes.jsonl"
        path.parent.mkdir(exist_ok=True)
        seeds = self.settings.evaluation_seeds
        limit = self.settings.max_steps
        return self._episodes(path, lambda: self._policy(stage), stage, seeds, limit)

    def _policy(self, stage: str) -> ModelPolicy:
        policy = ModelPolicy(
            self.model(stage),
            self.tokenizer,
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=self.ends,
            system=self.system(stage),
        )
        policy.name = stage
        return policy

    def system(self, stage: str) -> str | None:
        """The first message to the model: who was trained knows what the actions are."""
        return self.instructions if stage == UNTRAINED else None

    def _episodes(
        self,
        path: Path,
        policy: Callable[[], Policy],
        name: str,
        seeds: Sequence[int],
        max_steps: int | None,
    ) -> list[Episode]:
        """Run and keep those that ``path`` does not have. A batch runs as a whole: it decides
        rounding, so that what is missing is what it would have been."""
        run = {
            "command": "demo",
            "env": self.settings.environment,
            "policy": name,
            "max_steps": max_steps,
            "batch_size": _BATCH,
        }
        with open_episodes(path, run, seeds) as file:
            batches = [seeds[i : i + _BATCH] for i in range(0, len(seeds), _BATCH)]
            missing = [batch for batch in batches if any(seed not in file.ended for seed in batch)]
            found: list[Episode] = []
            if missing:
                found = run_episodes(
                    self.settings.environment,
                    policy(),
                    [seed for batch in missing for seed in batch],
                    max_steps=max_steps,
                    batch_size=_BATCH,
                    progress=name,
                    on_end=file.append,
                )
            by_seed = {episode.seed: episode for episode in found} | file.ended
        return [by_seed[seed] for seed in seeds]

    # -- training --------------------------------------------------------------------------------

    def train(self, stage: str) -> None:
        """One of ``TITLES``: an arm goes on from ``sft``, the others begin a new adapter."""
        lora = LoraConfig(
            r=self.settings.lora_rank,
            lora_alpha=2 * self.settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

        def make_trainer(args: StepAgentConfig) -> StepAgentTrainer:
            goes_on = stage in ARMS
            return StepAgentTrainer(
                self._adapted("sft", trained=True) if goes_on else self._untrained(),
                args,
                self.trajectories,
                self.tokenizer,
                peft_config=None if goes_on else lora,
                env=self.settings.environment,
                callbacks=[UpdateCosts()],
            )

        options = stage_options(self.settings, stage)
        train_stage(self.folder / stage, TITLES[stage], options, make_trainer)

    # -- models ----------------------------------------------------------------------------------

    def model(self, stage: str) -> PreTrainedModel:
        """The model of a stage as one, its adapter merged into the weights."""
        if stage == UNTRAINED:
            return self._untrained()
        return cast("PreTrainedModel", self._adapted(stage).merge_and_unload())

    def _untrained(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            self._base, use_safetensors=True, dtype=torch.float32
        )
        torch.nn.Module.to(model, self.device)
        return cast("PreTrainedModel", model)

    def _adapted(self, stage: str, *, trained: bool = False) -> Any:
        folder = str(self.folder / stage)
        return PeftModel.from_pretrained(self._untrained(), folder, is_trainable=trained)


def _base_folder(model: str) -> Path:
    if model == "smollm2":
        return smollm2_folder(cache_folder() / "smollm2")
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"model must be 'smollm2' or a folder with a config.json, got {model!r}")
    return Path(model)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {folder} must have a chat template, it has none")
    return cast("PreTrainedTokenizerBase", tokenizer)
